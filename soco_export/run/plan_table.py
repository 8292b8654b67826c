"""What one set of scores gives at several sizes: the table that `plan` prints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soco_export.files.atomic import write_atomic
from soco_export.files.records import check_apart
from soco_export.files.text import aligned
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.manifest import Manifest, check_unchanged, places_elsewhere
from soco_export.run.folder.names import DAMAGE
from soco_export.run.plans.measured_plan import check_profile, plan_for
from soco_export.run.request import Outcome
from soco_export.run.stages.training import SCORES
from soco_train.errors import RecipeError
from soco_train.events import Notify, silent
from soco_train.plan.rank_plan import RankPlan
from soco_train.store.importances import Importances

LAYER_HEADER = ("layer", "shape", "rank", "before", "after", "")
SIZE_HEADER = ("keep", "model", "selected", "ranks", "left dense")


def scores_of(run: Path) -> Path:
    """Return the scores of `run`, or of the run of which it is another size, as they were written.

    Raises RecipeError if there are none.
    """
    manifest = Manifest.load(run)
    home = places_elsewhere(run).get(SCORES.name, run)
    found = home / SCORES.writes[0]
    if found.is_file():
        check_unchanged(home, [found.name])
        return found
    message, fix = f"{run} has no scores yet", "give a trained run"
    if home != run:
        message, fix = f"{run} is another size of {home}, and no scores lie there", "move it back into its run"
    elif manifest and not manifest.argv:
        message, fix = f"{run} has no scores: a sweep made it for its points", "give the run that was swept"
    elif manifest:
        fix = f"train it to its end: {manifest.command} (in the folder it names), or give a trained run"
    raise RecipeError(message, fix=fix, where=str(found))


def plan_sizes(
    run: Path, scores_file: Path, recipe: Recipe, sizes: Sequence[float], out: Path | None, notify: Notify = silent
) -> Outcome:
    """Plan every size from the scores in `scores_file`; with `out`, write plan-SIZE.json there for each.

    run: whose times of layers count, where times are what is planned for.
    """
    if out:
        _check_free(out, sizes)
    scores = Importances.load(scores_file)
    check_profile(recipe, run, scores)
    plans: dict[float, RankPlan] = {
        size: plan_for(recipe.model_copy(update={"keep_params": size}), scores, run, notify) for size in sizes
    }
    return _outcome(plans, scores.parameters, out)


def _outcome(plans: dict[float, RankPlan], total: int, out: Path | None) -> Outcome:
    written = {size: _write(plan, size, out) for size, plan in plans.items()} if out else {}
    documents = [_document(size, plan, total, written.get(size)) for size, plan in plans.items()]
    text = [_sizes(plans, total)] if len(plans) > 1 else [_layers(plan, total) for plan in plans.values()]
    return Outcome({"plans": documents}, "\n".join([*text, *(f"wrote {path}" for path in written.values())]))


def plan_byte_sizes(run: Path, scores_file: Path, recipe: Recipe, sizes: Sequence[int], out: Path | None) -> Outcome:
    """Plan the file sizes from what `run` has measured; the rest as `plan_sizes`."""
    from soco_export.run.plans.byte_plan import plan_bytes
    from soco_train.store.damage import Damage

    if not (run / DAMAGE).is_file():
        raise RecipeError(
            f"{run} has not measured what its layers lose",
            fix="cut the trained run to bytes once: soco-export export RUN --keep-bytes 90MB; then ask RUN again",
            where=str(run / DAMAGE),
        )
    if out:
        _check_free(out, sizes)
    check_unchanged(run, [DAMAGE])
    damage = Damage.load(run / DAMAGE)
    plans: dict[float, RankPlan] = {
        size: plan_bytes(recipe.model_copy(update={"keep_bytes": size}), damage) for size in sizes
    }
    return _outcome(plans, Importances.load(scores_file).parameters, out)


def _check_free(out: Path, sizes: Sequence[float]) -> None:
    check_apart(out, ())
    for path in [out / _name(size) for size in sizes]:
        if path.is_symlink() or path.exists():
            raise RecipeError(f"{path} is there already", fix="give another --out, or move it away", where="--out")


def _name(size: float) -> str:
    return f"plan-{size:.12g}.json"


def _write(plan: RankPlan, size: float, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    path = out / _name(size)
    write_atomic(path, plan.to_json())
    return path


def _document(size: float, plan: RankPlan, total: int, path: Path | None) -> dict[str, Any]:
    model = {"model_before": total, "model_after": total - plan.params_before + plan.params_after}
    written = {"path": str(path)} if path else {}
    return {**json.loads(plan.to_json()), **model, "ratio": plan.ratio, "left_dense": plan.dense_layers, **written}


def _sizes(plans: dict[float, RankPlan], total: int) -> str:
    rows = []
    for size, plan in plans.items():
        ranks = [layer.rank for layer in plan.layers.values() if not layer.dense]
        rows.append(
            (
                f"{size:.12g}",
                f"{total - plan.params_before + plan.params_after:,}",
                f"{plan.params_after:,}",
                f"{min(ranks)} … {max(ranks)}" if ranks else "-",
                f"{len(plan.dense_layers)} of {len(plan.layers)}",
            )
        )
    return "\n".join(aligned(SIZE_HEADER, rows))


def _kind(plan: RankPlan, name: str) -> str:
    """Return type and block of a layer's matrices: `int4-32`, or `same`."""
    kind, block = plan.weights.get(name, ""), plan.blocks.get(name)
    return f"{kind}-{block}" if block else kind


def _layers(plan: RankPlan, total: int) -> str:
    rows = []
    for name, layer in plan.layers.items():
        (m, n), rank = layer.shape, "full" if layer.narrowed else "dense" if layer.dense else str(layer.rank)
        stored = (plan.forms.get(name, ""), _kind(plan, name)) if plan.bytes else ()
        why = layer.reason if not plan.bytes else ""
        rows.append((name, f"{m}×{n}", rank, f"{m * n:,}", f"{layer.params:,}", " ".join(filter(None, stored)) or why))
    tables = [(name, "", "", "", "", _kind(plan, name)) for name in plan.weights if name not in plan.layers]
    rest = [
        (
            name,
            "×".join(map(str, weight.shape)),
            "left out",
            f"{weight.numbers:,}",
            f"{weight.numbers:,}",
            weight.reason,
        )
        for name, weight in plan.left_out.items()
    ]
    return "\n".join([*aligned(LAYER_HEADER, [*rows, *tables, *rest]), plan.describe(total)])
