"""Another form or size of a finished run: what it takes from there, and what may change."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from soco_export.recipe.difference import differences
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.allowed import EVIDENCE_SECTIONS
from soco_export.run.folder.manifest import Manifest, digest, places_elsewhere
from soco_export.run.folder.names import DAMAGE
from soco_export.run.on_run import Homes, advance, check, check_trained, homes_of, stages_of
from soco_export.run.request import Outcome, Request, run_recipe, size_name
from soco_export.run.stages.artefacts import PLAN, PRICE, SIZES_STAGE
from soco_export.run.stages.training import SCORES, TRAINING
from soco_export.run.terminal import run_outcome
from soco_train.errors import RecipeError
from soco_train.events import Notify


def from_run(request: Request, run: Path, notify: Notify) -> Outcome:
    """Write an existing run's model in another form, or at another size or with other settings in a folder of its own.

    That folder is `request.out`, or keep-SIZE inside the run; spectrum and scores stay where they are.
    Raises RecipeError if the settings differ in what the scores depend on, or if there are no scores yet.
    """
    recipe = run_recipe(run, request)
    check_trained(run)
    changed = recipe.override(request.overrides)
    keys = [key for key in differences(recipe, changed) if key.partition(".")[0] not in EVIDENCE_SECTIONS]
    if not keys and request.out is None:
        homes = homes_of(run)
        stages = stages_of(changed, request.format, homes)
        check(request, changed, run, stages, notify, homes)
        advance(request, changed, run, stages, notify, homes)
        return run_outcome(run)
    check_recut(keys, {"refine"} if recipe.refine.distill.sizes else set())
    root = request.out or _recut_folder(run, keys, changed)
    homes = {**trained_in(run, recipe), **_priced_in(run, recipe, changed)}
    stages = stages_of(changed, request.format, homes)
    check(request, changed, root, stages, notify, homes)
    advance(request, changed, root, stages, notify, homes)
    return run_outcome(root)


def trained_in(run: Path, recipe: Recipe) -> Homes:
    """Return what a run that cuts the scores of `run` anew has there, or where `run` has them that is one itself."""
    there = homes_of(run)
    once = (*TRAINING, SIZES_STAGE) if recipe.refine.distill.sizes else TRAINING
    return {stage.name: there.get(stage.name, (run, recipe)) for stage in once}


def _priced_in(run: Path, recipe: Recipe, changed: Recipe) -> Homes:
    """Return where the price of bytes lies: in the run itself, for all its sizes, unless this one rounds otherwise."""
    own = changed.keep_bytes is not None and not _priced_otherwise(recipe, changed)
    return {PRICE.name: homes_of(run).get(PRICE.name, (run, recipe))} if own else {}


def _priced_otherwise(recipe: Recipe, changed: Recipe) -> list[str]:
    """Return the keys in which two recipes differ that the price of bytes depends on."""
    return _within(differences(recipe, changed), PRICE.settings)


def _within(keys: Iterable[str], sections: Iterable[str]) -> list[str]:
    """Return the dotted keys that are one of `sections` or lie in one."""
    roots = tuple(f"{section}." for section in sections)
    return [key for key in keys if f"{key}.".startswith(roots)]


def priced_in(run: Path) -> Path:
    """Return the folder in which the price of bytes lies that a run or another size of one goes by."""
    return places_elsewhere(run).get(PRICE.name, run)


def check_priced(run: Path, recipe: Recipe, asked: Recipe) -> None:
    """Raise RecipeError if the price that lies in `run`, whose recipe is `recipe`, is not that of what is `asked`.

    What no manifest knows is taken as it is.
    """
    manifest = Manifest.load(run)
    stages = manifest.stages if manifest else {}
    price, scores = stages.get(PRICE.name), stages.get(SCORES.name)
    other = _priced_otherwise(recipe, asked)
    if price and scores and price.inputs.get(SCORES.name) != digest(scores):
        other = ["the scores"]
    if other:
        raise RecipeError(
            f"what layers lose was measured in {run.name} with other values of {', '.join(other)}",
            fix="measure with these once: soco-export export RUN --keep-bytes 90MB, with the same --set and an --out",
            where=str(run / DAMAGE),
        )


def check_recut(keys: Iterable[str], distilled: Iterable[str] = ()) -> None:
    """Raise RecipeError for one of the dotted `keys` that scores, or what is distilled beside them, depend on."""
    fixed = {key for stage in TRAINING for key in stage.settings} - {*PLAN.settings, "keep_bytes"}
    fixed |= {*distilled, "model", "data"}
    wrong = [key for key in _within(keys, fixed) if key != "model.dtype"]
    if wrong:
        raise RecipeError(
            f"{', '.join(wrong)} cannot change after training",
            fix="train another run: soco-export train --set … --out FOLDER",
            where="--set",
        )


def _recut_folder(run: Path, keys: Sequence[str], recipe: Recipe) -> Path:
    if list(keys) == ["keep_params"]:
        return run / f"keep-{size_name(recipe.keep_params)}"
    if list(keys) == ["keep_bytes"]:
        return run / f"keep-{recipe.keep_bytes}-bytes"
    raise RecipeError(
        f"{', '.join(keys)} differ from the run's", fix="say with --out where this other model goes", where="--set"
    )
