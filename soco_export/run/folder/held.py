"""The run folder: held by one process, bound to one recipe, never taken over from a stranger.

    runs/tiny/  manifest.json  recipe.lock.yaml  spectrum/  scores.safetensors  plan.json  factors.safetensors
                hf/  onnx/  onnx-dense/  evidence/  results.json  report.md  report.html  comment.md  junit.xml
                unfinished/

Everything that is not finished lies in unfinished/ and is moved to its name when it is whole. Only files that the
manifest lists, as it lists them, are ever replaced or deleted, and no link is followed.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from soco_export.files.atomic import remove, write_atomic
from soco_export.preflight.doctor import versions
from soco_export.recipe.load import lock
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.allowed import EVIDENCE_SECTIONS, PARTIAL, check_folder, read_lock
from soco_export.run.folder.manifest import Manifest, Process, StageRecord, lock_hash, record_outputs
from soco_export.run.folder.names import HELD, LOCK, UNFINISHED
from soco_train.errors import MachineError, RecipeError

WRITABLE = "give yourself the right to write there (chmod, chown), or give a writable --out"


@dataclass
class RunFolder:
    """An open run folder; only the process that holds it writes there."""

    root: Path
    recipe: Recipe
    manifest: Manifest

    def save(self) -> None:
        """Write the manifest."""
        self.manifest.save(self.root)

    @property
    def unfinished(self) -> Path:
        """Where stages work."""
        return self.root / UNFINISHED

    def install(
        self, workspace: Path, stage: str, record: StageRecord, writes: Sequence[str], shared: set[str]
    ) -> None:
        """Move what `stage` made in `workspace` to its place and record it; whole files and folders, by renames.

        record: what else the manifest is to say of the stage. shared: paths that other stages own inside of `writes`.
        The manifest lists the new files before the first rename and the old ones until after the last: a run that is
        killed in between knows either as its own.
        """
        manifest = self.manifest
        manifest.check_own(self.root, writes)
        made = record_outputs(workspace, writes, ())
        going = {name: file for name, file in manifest.written.items() if _under(name, writes)}
        kept = {name: file for name, file in manifest.written.items() if name not in going}
        manifest.written, manifest.earlier = {**kept, **made}, {**manifest.earlier, **going}
        self.save()
        for name in writes:
            self._swap(workspace, name)
        manifest.earlier = {}
        outputs = {name: file for name, file in made.items() if name not in shared}
        manifest.stages[stage] = record.model_copy(update={"outputs": outputs})
        remove(workspace)
        self.save()

    def _swap(self, workspace: Path, name: str) -> None:
        """Put `workspace`/`name` in the place of what is there; an old folder goes out of the way whole."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_dir():
            old = workspace / "replaced" / name
            old.parent.mkdir(parents=True, exist_ok=True)
            os.rename(target, old)
        os.replace(workspace / name, target)

    def drop_orphans(self) -> None:
        """Delete files of the run that no stage lists any more: what a run begun with --fresh has not made anew."""
        listed = {name for record in self.manifest.stages.values() for name in record.outputs}
        orphans = sorted(set(self.manifest.written) - listed)
        self.manifest.check_own(self.root, orphans)
        for name in orphans:
            remove(self.root / name)
            for folder in (self.root / name).parents:
                if folder == self.root or not folder.is_dir() or any(folder.iterdir()):
                    break
                folder.rmdir()
            del self.manifest.written[name]
        if orphans:
            self.save()


def read_folder(root: Path, recipe: Recipe) -> RunFolder:
    """Return the run folder of a run of `recipe` that another process holds; it must not be saved."""
    manifest = Manifest.load(root)
    if manifest is None:
        raise MachineError(
            f"{root} holds no run here", fix="put --out where all processes see the same files", where=str(root)
        )
    return RunFolder(root, recipe, manifest)


@contextmanager
def open_folder(root: Path, recipe: Recipe, argv: Sequence[str] = (), fresh: bool = False) -> Iterator[RunFolder]:
    """Hold `root` for a run of `recipe`, created if need be.

    argv: the command that makes the run; one that only looks at it again gives none, and the manifest keeps its own.
    `fresh` starts over: no stage counts as done, and each earlier file goes when the new one is whole.

    Raises RecipeError if it holds another run or another process holds it, MachineError if it cannot be written.
    """
    check_folder(root, recipe, fresh)
    with hold(root):
        yield _begin(root, recipe, argv, fresh)


@contextmanager
def open_home(root: Path, recipe: Recipe) -> Iterator[RunFolder]:
    """Hold the folder of another run of `recipe` for the stages that have their files there; errors as `open_folder`.

    What measures and judges stays as that run has it: its results were measured so, and its reports tell of them.
    """
    check_folder(root, recipe, fresh=False)
    if (root / LOCK).is_file():
        recipe = recipe.with_sections(read_lock(root), EVIDENCE_SECTIONS)
    with open_folder(root, recipe) as folder:
        yield folder


def check_idle(root: Path) -> None:
    """Raise RecipeError if another process holds `root`, MachineError if it cannot be written; makes nothing."""
    if (root / HELD).is_file():
        with hold(root):
            return
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        reason, fix = (
            ("not writable", WRITABLE) if there.is_dir() else ("a file", "move it away, or give another --out")
        )
        raise MachineError(f"cannot write to {root}: {there} is {reason}", fix=fix, where=str(root))


@contextmanager
def hold(root: Path) -> Iterator[None]:
    """Keep other processes from writing into `root`, created if need be; errors as `open_folder`."""
    from filelock import FileLock, Timeout

    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / HELD, timeout=0):
            yield
    except Timeout:
        raise RecipeError(
            f"{root} is in use by another process{_holder(root)}",
            fix="wait for it, or give another --out",
            where=str(root),
        ) from None
    except PermissionError as error:
        raise MachineError(f"cannot write to {root}: {error}", fix=WRITABLE, where=str(root)) from error


def _begin(root: Path, recipe: Recipe, argv: Sequence[str], fresh: bool) -> RunFolder:
    """Write manifest and lock, the manifest first: a folder is known as ours before anything else lies in it."""
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before, text = Manifest.load(root), lock(recipe)
    _clear_unfinished(root, before, fresh)
    manifest = Manifest(
        model=recipe.name,
        argv=list(argv) or (before.argv if before else []),
        seed=recipe.train.seed,
        versions=versions(),
        process=Process(pid=os.getpid(), host=socket.gethostname(), started=started),
        inputs=before.inputs if before else {},
        stages=before.stages if before and not fresh else {},
        written=before.written if before else {},
        earlier=before.earlier if before else {},
        homes=before.homes if before else {},
        locks=list(dict.fromkeys([lock_hash(text), *(before.locks[:1] if before else ())])),
    )
    manifest.settle(root)
    manifest.save(root)
    write_atomic(root / LOCK, text)
    return RunFolder(root, recipe, manifest)


def _holder(root: Path) -> str:
    """Return who holds the folder, as far as its manifest tells."""
    manifest = Manifest.load(root)
    return f" ({manifest.process.pid} on {manifest.process.host}, since {manifest.process.started})" if manifest else ""


def _clear_unfinished(root: Path, before: Manifest | None, fresh: bool) -> None:
    """Remove partial files of killed processes and, to start over, the workspaces of the earlier run's stages."""
    for path in [path for path in root.iterdir() if PARTIAL.fullmatch(path.name)]:
        remove(path)
    for stage in before.stages if before and fresh else ():
        for workspace in workspaces(root, stage):
            remove(workspace)


def workspaces(root: Path, stage: str) -> list[Path]:
    """Return the folders in which `stage` worked without finishing: unfinished/<stage>.<12 hex digits of its key>."""
    pattern = re.compile(rf"{re.escape(stage)}\.[0-9a-f]{{12}}")
    unfinished = root / UNFINISHED
    found = unfinished.iterdir() if unfinished.is_dir() else ()
    return [path for path in found if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink()]


def _under(name: str, paths: Sequence[str]) -> bool:
    return any(name == path or name.startswith(f"{path}/") for path in paths)
