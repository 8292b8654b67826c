"""From a request to a finished run folder: check everything first, hold the folder, bring its stages up to date."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from pathlib import Path

from soco_export.files.records import check_apart
from soco_export.recipe.difference import differences
from soco_export.recipe.recipe import Recipe
from soco_export.report.schema import Results
from soco_export.run.context import RunContext, quiet_transformers
from soco_export.run.folder.allowed import check_folder, check_place, read_lock
from soco_export.run.folder.held import RunFolder, check_idle, open_folder, open_home, read_folder
from soco_export.run.folder.manifest import Manifest, StageRecord, check_unchanged, places_elsewhere, stage_key
from soco_export.run.folder.names import EVIDENCE_FILES, LOCK, MANIFEST, REPORT_FILES, Format
from soco_export.run.pipeline import Pipeline, Stage, assist
from soco_export.run.request import Outcome, Request, check_profile_kept, run_recipe
from soco_export.run.stages.artefacts import artefacts
from soco_export.run.stages.evidence import EVIDENCE
from soco_export.run.stages.report import applicable, read_material, write_reports
from soco_export.run.stages.training import SCORES, TRAINING
from soco_export.run.terminal import run_outcome
from soco_train import parallel
from soco_train.errors import RecipeError
from soco_train.events import Event, Notify, silent


def training(request: Request, notify: Notify) -> Outcome:
    """Bring a run up to its scores."""
    request = replace(request, format="hf")  # nothing of ONNX is needed yet
    _check_out(request)
    recipe = request.resolve()
    if request.dry_run:
        return cost_card(recipe, request)
    root = request.folder(recipe)
    check(request, recipe, root, TRAINING, notify)
    advance(request, recipe, root, TRAINING, notify)
    scores = root / SCORES.writes[0]
    return Outcome(
        {"run": str(root), "scores": str(scores)}, f"{scores}: `soco-export plan {root}` shows what it gives"
    )


def whole_road(request: Request, notify: Notify) -> Outcome:
    """Bring a run up to its reports, and answer with its verdict."""
    _check_out(request)
    recipe = request.resolve()
    if request.dry_run:
        return cost_card(recipe, request)
    root = request.folder(recipe)
    stages = (*TRAINING, *artefacts(recipe, request.format), *EVIDENCE[request.format])
    check(request, recipe, root, stages, notify)
    advance(request, recipe, root, stages, notify)
    return run_outcome(root)


def check_trained(run: Path) -> None:
    """Raise RecipeError if the training of the run in `run` has not ended: a verb on a run would go on with it.

    Of another size of a run the scores lie in that run. A folder without a manifest is refused elsewhere.
    """
    manifest = Manifest.load(run)
    if manifest is None or SCORES.name in manifest.homes:
        return
    record = manifest.stages.get(SCORES.name)
    if record is None or record.status != "done" or not (run / SCORES.writes[0]).is_file():
        began = manifest.command if manifest.argv else "soco-export train"
        raise RecipeError(
            f"{run} has no scores yet: its training was stopped, or is still at work",
            fix=f"let it end first: the command that began it, {began}, without --fresh, goes on where it was",
            where=str(run),
        )


# where stages have their files that are not the run's own: stage → the other run's folder and recipe
Homes = Mapping[str, tuple[Path, Recipe]]


def _check_out(request: Request) -> None:
    """Raise for an `--out` that no run may be written into: before anything is imported to shrink a model for it."""
    if request.out is not None and not request.dry_run and parallel.leading():
        check_place(request.out)
        check_idle(request.out)


def check_places(
    request: Request, recipe: Recipe, root: Path, stages: Sequence[Stage[RunContext]], homes: Homes | None = None
) -> None:
    """Find what can be wrong with the folders and with what lies there of `stages`; the leading process does."""
    if not parallel.leading():
        return
    from soco_export.model.source import find_folder

    folder = find_folder(recipe) if recipe.model.weights == "pretrained" else None
    check_apart(root, [folder] if folder else [])
    check_folder(root, recipe, request.fresh)
    check_idle(root)
    for home, own in dict((homes or {}).values()).items():
        check_folder(home, own, fresh=False)
        check_idle(home)
    manifests = cache(Manifest.load)
    for stage in () if request.fresh else stages:
        home = (homes or {}).get(stage.name, (root, recipe))[0]
        if (manifest := manifests(home)) and (record := manifest.stages.get(stage.name)):
            manifest.check_own(home, record.outputs)
    check_profile_kept(recipe)


def check(
    request: Request,
    recipe: Recipe,
    root: Path,
    stages: Sequence[Stage[RunContext]],
    notify: Notify,
    homes: Homes | None = None,
) -> None:
    """Find everything that can be wrong before a weight is loaded or a file is written; the leading process does.

    The places are looked at first: what it takes to look at the rest takes seconds to import.
    """
    if not parallel.leading():
        return
    check_places(request, recipe, root, stages, homes)

    from soco_export.preflight.checks import check_everything
    from soco_export.preflight.cost_shape import participation_notes
    from soco_export.run.plans.measured_plan import check_profile

    check_everything(recipe, root, request.format)
    check_profile(recipe, root)
    for note in [*_unread(request, recipe), *participation_notes(recipe)]:
        notify(Event("check", 1, 1, {"": note}, "done"))


def _unread(request: Request, recipe: Recipe) -> list[str]:
    """Return one sentence if keys of `--set` mean nothing to the scorer of the recipe, else nothing."""
    from soco_train.scores.registry import find_scorer

    unread = find_scorer(recipe.train.scorer).unread(recipe.train)
    given = [key.strip().split(".") for key, _, _ in (override.partition("=") for override in request.set_ or ())]
    ignored = [".".join(parts) for parts in given if parts[0] == "train" and parts[1:2] and parts[1] in unread]
    return [f"the scorer {recipe.train.scorer} does not read {', '.join(ignored)}"] if ignored else []


def again(request: Request, run: Path, stage: str, notify: Notify) -> Outcome:
    """Repeat one measuring stage of an existing run (`proof` or `bench`), and report."""
    if request.recipe is not None:
        raise RecipeError("a run has its recipe already", fix="change single keys with --set", where="--recipe")
    recipe = run_recipe(run, request).override(request.overrides)
    check_trained(run)
    there = replace(request, format=run_format(run))
    homes = homes_of(run)
    stages = stages_of(recipe, there.format, homes)
    if stage not in {stage.name for stage in stages}:
        raise RecipeError(f"{run} has no ONNX model to time", fix=f"soco-export export {run}", where=str(run))
    check(there, recipe, run, stages, notify, homes)
    _lead(replace(there, argv=(), fresh=False), recipe, run, stages, notify, homes, afresh=stage)
    return run_outcome(run)


def stages_of(recipe: Recipe, format: Format, homes: Homes) -> list[Stage[RunContext]]:
    """Return all stages of a run; the model card beside a checkpoint that is another run's stays as it is."""
    stages = (*TRAINING, *artefacts(recipe, format), *EVIDENCE[format])
    reports = _reports_of(homes)
    return [replace(stage, writes=reports) if stage.name == "report" else stage for stage in stages]


def _reports_of(homes: Mapping[str, object]) -> tuple[str, ...]:
    """Return the reports of a run that has stages elsewhere: the model card lies with the checkpoint."""
    return tuple(name for name in REPORT_FILES if "checkpoint" not in homes or not name.startswith("hf/"))


def homes_of(root: Path) -> Homes:
    """Return what the run in `root` has in other runs' folders; RecipeError where its scores are nowhere."""
    manifest = Manifest.load(root)
    if manifest is None:
        return {}
    if SCORES.name not in {**manifest.stages, **manifest.homes}:
        raise RecipeError(
            f"{root} is another size of a run, and does not say of which",
            fix="make it again from the run that was trained: soco-export export RUN --keep-params … --out FOLDER",
            where=str(root / MANIFEST),
        )
    return {stage: (home, read_lock(home)) for stage, home in places_elsewhere(root).items()}


def report_again(request: Request, run: Path, notify: Notify) -> Outcome:
    """Judge results.json by the run's gates (`request.set_` may change them) and write every report anew.

    Raises RecipeError if anything but gates is to change: the report would tell of what was not measured.
    """
    results, recipe, changed = reportable(request, run, notify)
    if changed:
        notify(Event("report", 1, 1, {"": f"{', '.join(changed)}: changed for good, in {LOCK} too"}, "done"))
    with open_folder(run, recipe) as folder:
        homes = _still_at_home(run)
        context, written = RunContext(folder, results.format, notify, homes), _reports_of(homes)
        # the lock may have other settings by now, for what was not measured since
        settings = {**results.recipe, "gates": recipe.gates.model_dump(mode="json")}
        rejudged = results.judged(applicable(recipe, results.format)).model_copy(update={"recipe": settings})
        folder.manifest.check_own(run, written)
        work = folder.unfinished / f"report.{stage_key(settings, {})[:12]}"
        work.mkdir(parents=True, exist_ok=True)
        write_reports(rejudged, context, work)
        # with no key the stage is stale: the next run judges by its own gates again
        folder.install(work, "report", StageRecord(status="done", key=""), written, set())
    return run_outcome(run)


def reportable(request: Request, run: Path, notify: Notify) -> tuple[Results, Recipe, list[str]]:
    """Return the results of `run`, its recipe as `request.set_` changes it, and the keys of gates that it changes.

    Raises RecipeError for other keys, and for what no report can be written from; reads only.
    """
    check_unchanged(run, ["plan.json", *REPORT_FILES, *EVIDENCE_FILES])
    results = Results.load(run)
    measured = read_lock(run)
    recipe = measured.override(request.overrides)
    changed = differences(measured, recipe)
    keys = [key for key in changed if key.partition(".")[0] != "gates"]
    if keys:
        raise RecipeError(
            f"{', '.join(keys)} cannot change what has been measured",
            fix="set gates alone, or measure again with soco-export validate or bench",
            where="--set",
        )
    check_folder(run, recipe, fresh=False)
    read_material(RunContext(read_folder(run, recipe), results.format, notify, _still_at_home(run)))
    return results, recipe, changed


def _still_at_home(run: Path) -> dict[str, RunFolder]:
    """Return the folders of other runs in which `run` has files; one that was moved alone has left them behind."""
    there = {stage: home for stage, home in places_elsewhere(run).items() if (home / MANIFEST).is_file()}
    return {stage: read_folder(home, read_lock(home)) for stage, home in there.items()}


def run_format(run: Path) -> Format:
    """Return the form in which the run in `run` is measured: the one closest to deployment that lies there."""
    return "onnx" if (run / "onnx").is_dir() else "dense" if (run / "dense").is_dir() else "hf"


def advance(
    request: Request,
    recipe: Recipe,
    root: Path,
    stages: Sequence[Stage[RunContext]],
    notify: Notify,
    homes: Homes | None = None,
) -> None:
    """Hold the run folder (and those of other runs where stages are at home) and bring `stages` up to date.

    Of several processes the leading one does this; the others take part where it calls them.
    """
    with parallel.group():
        if parallel.leading():
            _lead(request, recipe, root, stages, notify, homes or {})
            parallel.call("")
        else:
            assist(stages, lambda: _helping_context(request, recipe, root, homes or {}))


def _lead(
    request: Request,
    recipe: Recipe,
    root: Path,
    stages: Sequence[Stage[RunContext]],
    notify: Notify,
    homes: Homes,
    afresh: str = "",
) -> None:
    """Bring `stages` up to date in this process; the one called `afresh` runs whatever it has done."""
    with ExitStack() as held:
        others = {home: held.enter_context(open_home(home, own)) for home, own in dict(homes.values()).items()}
        folder = held.enter_context(open_folder(root, recipe, request.argv, request.fresh))
        quiet_transformers()
        places = {stage: os.path.relpath(home.absolute(), root.absolute()) for stage, (home, _) in homes.items()}
        folder.manifest.homes = places
        folder.manifest.stages.pop(afresh, None)  # its files stay listed as the run's own
        folder.save()
        at_home = {stage: others[home] for stage, (home, _) in homes.items()}
        context = RunContext(folder, request.format, notify, at_home)
        Pipeline(folder, stages, context, context.sources(), at_home, notify).run()


def _helping_context(request: Request, recipe: Recipe, root: Path, homes: Homes) -> RunContext:
    """Read the folders that the leading process holds, without holding them."""
    quiet_transformers()
    at_home = {stage: read_folder(home, own) for stage, (home, own) in homes.items()}
    return RunContext(read_folder(root, recipe), request.format, silent, at_home)


def cost_card(recipe: Recipe, request: Request) -> Outcome:
    """Answer with what the run would cost; no network, no weights, nothing written."""
    from soco_export.preflight.checks import check_recipe, check_shape
    from soco_export.preflight.cost import estimate, measure
    from soco_export.preflight.cost_shape import participation_notes

    check_recipe(recipe, request.format)
    shape = measure(recipe)
    check_shape(recipe, shape)
    card = estimate(recipe, shape, request.format)
    notes = [*_unread(request, recipe), *participation_notes(recipe)]
    text = "\n".join([*card.lines(), *(f"note: {note}" for note in notes)])
    return Outcome(card.document() | ({"notes": notes} if notes else {}), text)
