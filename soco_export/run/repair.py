"""A run that lost what says what it is: its manifest or its lock is made again from what the other files say.

    manifest lost   the files of each stage are held against those they were made from (stages/agreement.py)
    lock lost       a recipe is the run's if it gives the keys that the manifest has; it is taken from results.json, or
                    from the flags of the command

Nothing is taken on trust in silence: files that do not agree are left out and named, and are the user's from then on.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from soco_export.files.atomic import write_atomic
from soco_export.recipe.load import lock
from soco_export.recipe.recipe import Recipe, validated
from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.context import RunContext, quiet_transformers
from soco_export.run.folder.allowed import read_lock
from soco_export.run.folder.held import RunFolder, hold, read_folder
from soco_export.run.folder.manifest import Manifest, Process, check_unchanged, digest, lock_hash
from soco_export.run.folder.names import LOCK, MANIFEST
from soco_export.run.on_run import homes_of, run_format, stages_of
from soco_export.run.pipeline import Pipeline, Stage
from soco_export.run.request import Outcome, Request, run_recipe
from soco_export.run.stages.agreement import AGREE, command_of
from soco_export.run.stages.evidence import EVIDENCE
from soco_train.errors import DataError, RecipeError, SocoError
from soco_train.events import Notify


def repair_run(request: Request, root: Path, notify: Notify) -> Outcome:
    """Make the lost one of manifest.json and recipe.lock.yaml of the run in `root` again, or say why it cannot be."""
    manifest, locked = (root / MANIFEST).is_file(), (root / LOCK).is_file()
    if manifest:
        Manifest.load(root)
    if locked or not manifest:
        read_lock(root)  # where nothing of ours is, that is said before a file is held there
    if manifest and locked:
        text = f"{root} has its {MANIFEST} and its {LOCK}: nothing to repair"
        return Outcome({"run": str(root), "written": None}, text)
    quiet_transformers()
    with hold(root):
        return _restore_manifest(request, root, notify) if locked else _restore_lock(request, root, notify)


def _restore_manifest(request: Request, root: Path, notify: Notify) -> Outcome:
    folder = RunFolder(root, run_recipe(root, request), _blank_manifest(root, run_recipe(root, request)))
    left = _adopt(folder, notify)
    done = list(folder.manifest.stages)
    if "scores" not in done:
        reason = left.get("scores", "its scores are not there")
        raise RecipeError(
            f"{root} cannot be repaired: {reason}",
            fix="make it again; another size of a run with soco-export export RUN --keep-params … --out FOLDER",
            where=str(root),
        )
    folder.save()
    lines = [
        f"{root / MANIFEST} was written: {', '.join(done)} agree",
        *(f"left out: {stage}, for {why}" for stage, why in left.items()),
        *(
            ["what was left out is not the run's any more: move it away, and the same command makes it again"]
            if left
            else []
        ),
    ]
    return Outcome({"run": str(root), "written": MANIFEST, "stages": done, "left_out": left}, "\n".join(lines))


def _blank_manifest(root: Path, recipe: Recipe) -> Manifest:
    """Return a manifest of no stages; date and versions are those of results.json, where they are known."""
    told = Results.load(root) if (root / RESULTS_FILE).is_file() else None
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    started = str(told.provenance.get("started", now)) if told else now
    return Manifest(
        model=recipe.name,
        argv=command_of(root),
        seed=recipe.train.seed,
        versions=dict(told.machine.versions) if told else {},
        process=Process(pid=os.getpid(), host=socket.gethostname(), started=started),
    )


def _adopt(folder: RunFolder, notify: Notify) -> dict[str, str]:
    """Record each stage whose files are there and agree; return why others, whose files are there, do not."""
    format = run_format(folder.root)
    stages = stages_of(folder.recipe, format, {})
    context = RunContext(folder, format, notify)
    pipeline = Pipeline(folder, stages, context, context.sources(), notify=notify)
    left: dict[str, str] = {}
    for stage in stages:
        if not all((folder.root / name).exists() for name in stage.writes):
            continue
        why = _doubt(stage, context, stages, left)
        if not why:
            why = _adopted(pipeline, stage) or _changed(folder, stage.name)
        if why:
            folder.manifest.disown(stage.name)
            left[stage.name] = why
    return left


def _adopted(pipeline: Pipeline[RunContext], stage: Stage[RunContext]) -> str:
    """Record a stage; return why that is not possible, as of a link among its files, "" if it was."""
    try:
        pipeline.adopt(stage)
    except DataError as error:
        return error.message
    return ""


def _doubt(
    stage: Stage[RunContext], context: RunContext, stages: list[Stage[RunContext]], left: Mapping[str, str]
) -> str:
    """Return why the files of a stage are not known to be the run's, "" if they are."""
    made = context.folder.manifest.stages
    needed = [other.name for other in stages if other.name in stage.reads and not other.cache]
    missing = [name for name in needed if name not in made]
    if missing:
        return f"{missing[0]}, which it was made from, {'is left out' if missing[0] in left else 'is not there'}"
    try:
        return AGREE[stage.name](context)
    except SocoError as error:
        return error.message


def _changed(folder: RunFolder, stage: str) -> str:
    """Hold what a stage wrote against the hash that results.json has of it, where there is one."""
    told = Results.load(folder.root).provenance if (folder.root / RESULTS_FILE).is_file() else {}
    expected = dict(told.get("made", {})).get(stage)
    found = digest(folder.manifest.stages[stage])
    return "" if expected in (None, found) else f"what it wrote is not what {RESULTS_FILE} was measured on"


def _restore_lock(request: Request, root: Path, notify: Notify) -> Outcome:
    recipe = _candidate(request, root)
    homes = homes_of(root)
    at_home = {stage: read_folder(home, own) for stage, (home, own) in homes.items()}
    folder, format = read_folder(root, recipe), run_format(root)
    context = RunContext(folder, format, notify, at_home)
    stages = stages_of(recipe, format, homes)
    pipeline = Pipeline(folder, stages, context, context.sources(), at_home, notify)
    looks = {stage.name for stage in EVIDENCE[format]}  # may have been looked at in another way since
    known = [stage for stage in stages if stage.name in folder.manifest.stages and stage.name not in looks]
    wrong = [stage.name for stage in known if not pipeline.gives_key(stage)]
    if wrong or not known:
        raise RecipeError(
            f"this is not the recipe of the run in {root}: {', '.join(wrong) or 'nothing'} was made with it",
            fix=_flags(root, folder.manifest),
            where=str(root / MANIFEST),
        )
    written = lock(recipe)
    write_atomic(root / LOCK, written)
    if folder.manifest.locks and lock_hash(written) not in folder.manifest.locks:  # looked at in another way since
        folder.manifest.locks.append(lock_hash(written))
        folder.save()
    names = [stage.name for stage in known]
    text = f"{root / LOCK} was written: it gives the keys of {', '.join(names)}"
    return Outcome({"run": str(root), "written": LOCK, "stages": names, "left_out": {}}, text)


def _candidate(request: Request, root: Path) -> Recipe:
    """Return the recipe that the flags mean, else the one in results.json; RecipeError where there is none."""
    if request.model is not None or request.recipe is not None:
        return request.resolve()
    if (root / RESULTS_FILE).is_file():
        check_unchanged(root, [RESULTS_FILE])
        return validated(Results.load(root).recipe, {})
    manifest = Manifest.load(root)
    assert manifest is not None
    raise RecipeError(
        f"{root} has lost its {LOCK}, and has no {RESULTS_FILE} that would tell it",
        fix=_flags(root, manifest),
        where=str(root / LOCK),
    )


def _flags(root: Path, manifest: Manifest) -> str:
    return (
        f"soco-export repair {root} with the flags (--model, --recipe, --keep-params, --seed, --tiny, --set) of the "
        f"command that made it: {' '.join(manifest.argv[1:]) or 'unknown'}"
    )
