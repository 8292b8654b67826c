"""The run folder: held by one process, bound to one recipe, never taken over from a stranger.

    runs/tiny/  manifest.json  recipe.lock.yaml  spectrum/  scores.safetensors  plan.json  factors.safetensors
                hf/  onnx/  onnx-dense/  evidence/  results.json  report.md  report.html  junit.xml  unfinished/

Everything that is not finished lies in unfinished/ and is moved to its name when it is whole.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from soco_export.doctor import versions
from soco_export.recipe import Recipe, load_recipe, lock
from soco_export.run.manifest import MANIFEST, Manifest, Process, write_atomic
from soco_train.errors import MachineError, RecipeError

LOCK = "recipe.lock.yaml"
UNFINISHED = "unfinished"
HELD = "run.held"
CONTENT = (
    *("spectrum", "scores.safetensors", "plan.json", "factors.safetensors", "hf", "dense", "onnx", "onnx-dense"),
    *("evidence", "latency.json", "results.json", "report.md", "report.html", "junit.xml", UNFINISHED, LOCK, MANIFEST),
)
# Sections that say how a result is looked at; changing them in an existing run only repeats the looking.
EVIDENCE_SECTIONS = frozenset({"description", "evaluation", "validate", "bench", "gates"})


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


def read_folder(root: Path, recipe: Recipe) -> RunFolder:
    """Return the run folder of a run of `recipe` that another process holds; it must not be saved."""
    manifest = Manifest.load(root)
    if manifest is None:
        raise MachineError(
            f"{root} holds no run here", fix="put --out where all processes see the same files", where=str(root)
        )
    return RunFolder(root, recipe, manifest)


def check_folder(root: Path, recipe: Recipe, fresh: bool) -> None:
    """Raise RecipeError if a run of `recipe` must not be written into `root`; reads only."""
    if not root.exists():
        return
    if not root.is_dir():
        raise RecipeError(f"{root} is a file", fix="give another --out", where="--out")
    if not (root / MANIFEST).exists():
        strangers = sorted(path.name for path in root.iterdir() if path.name not in (HELD, LOCK, UNFINISHED))
        if strangers:
            raise RecipeError(
                f"{root} holds files that are no run of soco-export ({', '.join(strangers[:3])})",
                fix="give another --out: nothing is written over them, not even with --fresh",
                where="--out",
            )
        return
    if not fresh:
        _check_same_run(root, recipe)


def _check_same_run(root: Path, recipe: Recipe) -> None:
    Manifest.load(root)
    try:
        there = read_lock(root)
    except RecipeError as error:
        raise RecipeError(
            f"{root} holds a run that this version cannot read: {error.message}",
            fix="give another --out, or --fresh to start over there (its results are then lost)",
            where=error.where,
        ) from error
    changed = [key for key in differences(there, recipe) if key.split(".")[0] not in EVIDENCE_SECTIONS]
    if changed:
        shown = ", ".join(changed[:4]) + (f" and {len(changed) - 4} more" if len(changed) > 4 else "")
        raise RecipeError(
            f"{root} holds another run: {shown} differ{'s' if len(changed) == 1 else ''}",
            fix="give another --out, or --fresh to start over there (its results are then lost)",
            where=str(root / LOCK),
        )


def read_lock(root: Path) -> Recipe:
    """Return the recipe of the run in `root`; RecipeError if there is none."""
    if not (root / LOCK).is_file():
        raise RecipeError(
            f"{root} holds no run of soco-export",
            fix="give the folder that train or train-and-export wrote (it holds recipe.lock.yaml)",
            where=str(root),
        )
    return load_recipe(root / LOCK)


def differences(one: Recipe, two: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ."""
    flat_one, flat_two = (flatten(recipe.model_dump(mode="json", by_alias=True)) for recipe in (one, two))
    return [key for key in {**flat_one, **flat_two} if flat_one.get(key) != flat_two.get(key)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        flat.update(inner)
    return flat


@contextmanager
def open_folder(root: Path, recipe: Recipe, argv: Sequence[str] = (), fresh: bool = False) -> Iterator[RunFolder]:
    """Hold `root` for a run of `recipe`, created if need be; `fresh` empties it of its earlier run.

    Raises RecipeError if it holds another run or another process holds it, MachineError if it cannot be written.
    """
    from filelock import FileLock, Timeout

    check_folder(root, recipe, fresh)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / HELD, timeout=0):
            if fresh:
                _empty(root)
            yield _begin(root, recipe, argv)
    except Timeout:
        raise RecipeError(
            f"{root} is in use by another process{_holder(root)}",
            fix="wait for it, or give another --out",
            where=str(root),
        ) from None
    except PermissionError as error:
        raise MachineError(f"cannot write to {root}: {error}", fix="give a writable --out", where="--out") from error


def _begin(root: Path, recipe: Recipe, argv: Sequence[str]) -> RunFolder:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    before = Manifest.load(root)
    manifest = Manifest(
        model=recipe.name,
        argv=list(argv),
        seed=recipe.train.seed,
        versions=versions(),
        process=Process(pid=os.getpid(), host=socket.gethostname(), started=started),
        inputs=before.inputs if before else {},
        stages=before.stages if before else {},
    )
    write_atomic(root / LOCK, lock(recipe))
    manifest.save(root)
    return RunFolder(root, recipe, manifest)


def _holder(root: Path) -> str:
    """Return who holds the folder, as far as its manifest tells."""
    manifest = Manifest.load(root)
    return f" ({manifest.process.pid} on {manifest.process.host}, since {manifest.process.started})" if manifest else ""


def _empty(root: Path) -> None:
    """Remove what runs write, the manifest last: a half-emptied folder is still known as ours."""
    for name in CONTENT:
        remove(root / name)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
