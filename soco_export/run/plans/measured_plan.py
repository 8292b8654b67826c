"""The rank plan of a run: by parameters alone, or with the measured times of this machine as limits.

Times are measured once and kept in `latency.profile` (default: latency.json in the run folder); a file made under other
conditions (processor, threads, weight type …) is measured anew.
"""

from __future__ import annotations

from math import lcm
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

from soco_export.bench.layer_times import Profile, Shape, limits
from soco_export.files.atomic import write_atomic
from soco_export.files.machine import machine_limits
from soco_export.files.records import check_apart
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.names import PROFILE
from soco_train.errors import RecipeError
from soco_train.events import Notify
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.plan import Storage
from soco_train.store.importances import Importances

if TYPE_CHECKING:
    from soco_export.bench.device import Device


def plan_for(recipe: Recipe, scores: Importances, folder: Path, notify: Notify) -> RankPlan:
    """Plan `scores` as `recipe` says; `folder` is the run's, where a profile is kept unless the recipe names a file.

    Raises what `plan_ranks` raises, RecipeError too where too few layers are faster at low rank to reach the size, and
    MachineError if the provider to be measured is not there.
    """
    if recipe.optimise_for == "params":
        return plan_ranks(scores, recipe.plan)
    path = recipe.latency.profile or folder / PROFILE
    shapes = {name: layer.shape for name, layer in scores.layers.items()}
    profile = read_or_measure(path, set(shapes.values()), recipe.storage, _device(recipe, scores), notify)
    settings = recipe.plan.model_copy(update={"multiple": lcm(recipe.multiple, profile.multiple)})
    ends = limits(profile, shapes, settings.storage, settings.multiple)
    try:
        return plan_ranks(scores, settings, limits=ends)
    except RecipeError as error:
        raise RecipeError(
            f"too few layers are faster at low rank on this machine to reach keep_params {settings.keep_params:g}",
            fix=f"{error.fix}; or plan with optimise_for: params",
            where=str(path),
        ) from error


def check_profile(recipe: Recipe, folder: Path, scores: Importances | None = None) -> None:
    """Raise what reading the profile of a run in `folder`, or writing it there, would: asked before it trains.

    DataError or RecipeError for a file that is none or a link, MachineError where it cannot be written. `scores`: of a
    run that has trained, which say what is to be measured; of any other the dense model does.
    """
    path = recipe.latency.profile or folder / PROFILE
    if recipe.optimise_for == "params" or not (recipe.latency.profile or path.exists()):
        return
    kept = _kept(path, _device(recipe, scores))
    if kept is not None and not kept.lacks(_shapes(recipe, scores), recipe.storage):
        return
    check_apart(path, (), where="recipe: latency.profile")
    existing = next(parent for parent in path.absolute().parents if parent.exists())
    with machine_limits("latency.profile", path), TemporaryFile(dir=existing):
        pass  # it can be written, and is gone


def _shapes(recipe: Recipe, scores: Importances | None) -> set[Shape]:
    if scores is not None:
        return {layer.shape for layer in scores.layers.values()}
    from soco_export.preflight.cost_shape import measure

    return set(measure(recipe).linears)


def _device(recipe: Recipe, scores: Importances | None) -> Device:
    from soco_export.bench.device import Device

    proof = recipe.validation
    return Device(proof.provider, proof.threads, recipe.export, _biased(recipe, scores), recipe.latency.tokens)


def _biased(recipe: Recipe, scores: Importances | None) -> bool:
    """Tell whether pruned layers add a bias."""
    if scores is not None:
        return any(layer.deviates for layer in scores.layers.values())
    from soco_train.scores.registry import find_scorer

    return find_scorer(recipe.train.scorer).deviates(recipe.train)


def _kept(path: Path, device: Device) -> Profile | None:
    """Return the profile in `path`, None if there is none that was made under the conditions of `device`."""
    kept = Profile.load(path) if path.exists() else None
    return kept if kept is not None and kept.conditions == device.conditions() else None


def read_or_measure(path: Path, shapes: set[Shape], form: Storage, device: Device, notify: Notify) -> Profile:
    """Return the profile kept in `path`, completed by what it lacks, or a new one; `path` is written if it grew."""
    kept = _kept(path, device)
    missing = shapes if kept is None else kept.lacks(shapes, form)
    if not missing and kept is not None:
        return kept
    from soco_export.bench.layer_timing import measure_profile

    found = measure_profile(sorted(missing), form, device, notify)
    whole = found if kept is None else kept.completed_by(found)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, whole.to_json())
    return whole
