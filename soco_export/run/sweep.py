"""Several sizes and types of weights from one training, each an ordinary run.

    RUN                    spectrum, scores; the point of its own size and type
    RUN/keep-0.8           another size: plan, factors, hf; its point in the run's own type
    RUN/keep-0.8-int8      only what differs by type: onnx, evidence, report
    RUN/dense-int8         the dense model in that type, which all sizes are timed against

Nothing is trained or written twice: a point reads what it shares where it is made first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

from soco_export.files.records import folder_bytes
from soco_export.files.text import aligned
from soco_export.recipe.difference import differences
from soco_export.recipe.recipe import Recipe
from soco_export.report.frontier import dense_point, frontier_table, frontier_text, point_of
from soco_export.report.material import FrontierPoint
from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.another_size import trained_in
from soco_export.run.folder.allowed import EVIDENCE_SECTIONS
from soco_export.run.folder.held import open_home
from soco_export.run.folder.manifest import Manifest, StageRecord, stage_key
from soco_export.run.folder.names import FRONTIER_FILE
from soco_export.run.on_run import (
    Homes,
    advance,
    check,
    check_places,
    check_trained,
    homes_of,
    report_again,
    reportable,
    stages_of,
)
from soco_export.run.request import Outcome, Request, parse_sizes, run_recipe, size_name
from soco_export.run.stages.training import SCORES
from soco_train import parallel
from soco_train.errors import RecipeError
from soco_train.events import Event, Notify
from soco_train.settings.rounding import TYPES

# what a size has in all types of weights: made in its own folder, in the run's type
BY_SIZE = ("plan", "factors", "checkpoint")


@dataclass(frozen=True)
class _Place:
    """Where one point of a sweep is made: its folder, its recipe, and what lies in the folders of others."""

    root: Path
    recipe: Recipe
    homes: Homes


def sweep_run(request: Request, run: Path, sizes: str | None, weights: str | None, notify: Notify) -> Outcome:
    """Make and measure every size in every type of weights, and write what was found as the run's frontier.json.

    A point that fails a gate is a point all the same. Raises RecipeError, before anything is made, for sizes and types
    that are none, and for a point that cannot be exported.
    """
    recipe = run_recipe(run, request)
    check_trained(run)
    changed = recipe.override(request.overrides)
    _check(recipe, changed)
    wanted = [
        place(run, changed, size, kind)
        for kind in parse_weights(weights, changed.export.weights)
        for size in parse_sizes(sizes, changed.keep_params)
    ]
    _check_own(run, wanted)
    if (run / RESULTS_FILE).is_file() and run not in {point.root for point in wanted}:
        # its report will show the frontier, and nothing before that makes what is missing
        reportable(replace(request, set_=None), run, notify)
    stages = [stages_of(point.recipe, "onnx", point.homes) for point in wanted]
    for point, own in zip(wanted, stages, strict=True):  # of all points, before the first one's check imports anything
        check_places(request, point.recipe, point.root, own, point.homes)
    for point, own in zip(wanted, stages, strict=True):
        check(request, point.recipe, point.root, own, notify, point.homes)
    for number, (point, own) in enumerate(zip(wanted, stages, strict=True), 1):
        notify(Event("point", number, len(wanted), {"": str(point.root)}, "done"))
        advance(request, point.recipe, point.root, own, notify, point.homes)
    points = tuple(_points(run, wanted))
    _record(run, recipe, points)
    if (run / RESULTS_FILE).is_file():
        report_again(replace(request, set_=None), run, notify)
    found = frontier_table(points)
    assert found is not None
    lines = [*aligned(found.columns, found.rows), found.note, f"choose one: soco-export choose {run} --max-bytes …"]
    return Outcome({"run": str(run), "points": [asdict(point) for point in points]}, "\n".join(lines))


def _check(recipe: Recipe, changed: Recipe) -> None:
    """Raise RecipeError where a sweep means nothing, or would vary something else."""
    if parallel.launched():
        raise RecipeError("a sweep is one process", fix="run it without torchrun: only the training gains by several")
    if recipe.keep_bytes is not None:
        raise RecipeError(
            "this run was planned for bytes, which choose the types of weights themselves",
            fix="sweep a run without keep_bytes, or soco-export export RUN --keep-bytes for each size",
            where="recipe: keep_bytes",
        )
    keys = [key for key in differences(recipe, changed) if key.partition(".")[0] not in EVIDENCE_SECTIONS]
    if keys:
        raise RecipeError(
            f"{', '.join(keys)} cannot change in a sweep",
            fix="vary --keep-params and --weights; --set may change what measures and judges",
            where="--set",
        )


def _check_own(run: Path, wanted: Sequence[_Place]) -> None:
    """Raise RecipeError for an edited file that a point writes or reads: its turn may come after hours of others."""
    manifests = cache(Manifest.load)
    names: dict[Path, set[str]] = {run: {FRONTIER_FILE}}
    for point in wanted:
        own = manifests(point.root)
        names.setdefault(point.root, set()).update(own.written if own else ())
        for stage, (home, _) in point.homes.items():
            there = manifests(home)
            read = there.stages.get(stage) if there else None
            names.setdefault(home, set()).update(read.outputs if read else ())
    for folder, files in sorted(names.items()):
        if manifest := manifests(folder):
            manifest.check_own(folder, sorted(files))


def parse_weights(text: str | None, default: str) -> list[str]:
    """Return the types of `--weights same,int8`; RecipeError for one that is none."""
    found = [default] if text is None else [part.strip() for part in text.split(",")]
    for kind in found:
        if kind not in TYPES:
            raise RecipeError(f"{kind!r} is no type of weights", fix=f"one of {', '.join(TYPES)}", where="--weights")
    return list(dict.fromkeys(found))


def place(run: Path, recipe: Recipe, size: float, weights: str) -> _Place:
    """Return where the point of `size` in `weights` is made, from a `run` with this recipe."""
    own_size, own_type = size == recipe.keep_params, weights == recipe.export.weights
    if own_size and (trained := homes_of(run).get(SCORES.name)):
        raise RecipeError(
            f"{run} is another size of {trained[0]}, which has the scores and the dense model that its points share",
            fix=f"soco-export sweep {trained[0]} --keep-params {size_name(size)}",
            where="--keep-params",
        )
    sized = recipe if own_size else recipe.replace({"keep_params": size})
    base = run if own_size else run / f"keep-{size_name(size)}"
    shared = {} if own_size else dict(trained_in(run, recipe))
    if own_type:
        return _Place(base, sized, shared | ({"onnx-dense": (run, recipe)} if shared else {}))
    typed = sized.replace({"export.weights": weights})
    dense = recipe.replace({"export.weights": weights})
    homes: dict[str, tuple[Path, Recipe]] = {**trained_in(run, recipe), "onnx-dense": (run / f"dense-{weights}", dense)}
    if recipe.optimise_for == "params":  # else the plan follows times that the type changes
        homes |= {stage: (base, sized) for stage in BY_SIZE}
    return _Place(run / f"keep-{size_name(size)}-{weights}", typed, homes)


def _points(run: Path, wanted: Sequence[_Place]) -> Iterator[FrontierPoint]:
    """Yield the dense model once for each type, before the points of the type."""
    own = run / "onnx-dense"
    beside = folder_bytes(own) if own.is_dir() else 0
    seen: set[str] = set()
    for point in wanted:
        results = Results.load(point.root)
        kind = point.recipe.export.weights
        dense = point.homes.get("onnx-dense", (run, None))[0] / "onnx-dense"
        beside = beside or results.sizes.bytes["onnx-dense"]
        if kind not in seen:
            seen.add(kind)
            yield dense_point(results, dense.relative_to(run).as_posix(), beside)
        yield point_of(results, point.root.relative_to(run).as_posix(), beside)


def _record(run: Path, recipe: Recipe, points: Sequence[FrontierPoint]) -> None:
    """Put frontier.json into the run's evidence, in its manifest."""
    text = frontier_text(points)
    with open_home(run, recipe) as folder:
        work = folder.unfinished / f"frontier.{stage_key(text, {})[:12]}"
        (work / FRONTIER_FILE).parent.mkdir(parents=True, exist_ok=True)
        (work / FRONTIER_FILE).write_text(text, encoding="utf-8")
        folder.install(work, "frontier", StageRecord(status="done", key=stage_key(text, {})), (FRONTIER_FILE,), set())
