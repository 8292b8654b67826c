"""manifest.json: what a run read, wrote and still owes, so that it resumes by itself and can be checked later.

A stage is done when the hash over everything it read (its key) and the hashes of everything it wrote still agree.
What is listed in `written` is the run's own; whatever else lies in its folder, or was changed there, is the user's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError

from soco_export.files.atomic import write_atomic
from soco_export.files.records import FileRecord, Record, check_ours, not_ours, record_file, record_files
from soco_export.run.folder.names import MANIFEST, REPORT_FILES
from soco_train.bounded import read_bytes
from soco_train.errors import RecipeError

NEW = "not run yet"
EDITED = (
    "move them elsewhere: the same command then makes what is missing; "
    "a model that you changed is measured by soco-export validate FOLDER --against MODEL"
)


def _check_inside(name: str) -> str:
    """Return a file's name relative to the run; ValueError for one that leads elsewhere: it would be deleted there."""
    if name.startswith("/") or not {"", ".", ".."}.isdisjoint(name.split("/")) or "\0" in name:
        raise ValueError(f"{name[:60]!r} is no name of a file in the run")
    return name


_Files = dict[Annotated[str, AfterValidator(_check_inside)], FileRecord]  # by path in the run


class StageRecord(Record):
    """`key` hashes the settings and inputs; `inputs` are hashes by name; `outputs` are files by path in the run."""

    status: Literal["running", "done"]
    key: str
    inputs: dict[str, str] = Field(default_factory=dict)
    outputs: _Files = Field(default_factory=dict)
    seconds: float = 0.0


def digest(record: StageRecord) -> str:
    """Return one hash over everything that a stage wrote."""
    return stage_key(None, {path: file.sha256 for path, file in record.outputs.items()})


class Process(Record):
    """Who works (or last worked) in the folder."""

    pid: int
    host: str
    started: str


class Manifest(Record):
    """The whole run. `inputs` are the files read from outside, by path; the recipe lies beside it as a lock file.

    `written` are all files of the run as they were last written; while some are being replaced `earlier` still has
    the ones that go, so that a run killed in between knows either as its own. `homes`: the folder, relative to this
    one, of each stage whose files are another run's. `locks`: sha256 of the lock file as the run writes it, and as it
    was before, for a run that is killed between the two; empty in a manifest that was made again.
    """

    schema_version: Literal[1] = 1
    model: str
    argv: list[str]
    seed: int
    versions: dict[str, str]
    process: Process
    inputs: dict[str, FileRecord] = Field(default_factory=dict)
    stages: dict[str, StageRecord] = Field(default_factory=dict)
    written: _Files = Field(default_factory=dict)
    earlier: _Files = Field(default_factory=dict)
    homes: dict[str, str] = Field(default_factory=dict)
    locks: list[str] = Field(default_factory=list)

    @property
    def command(self) -> str:
        """Return the command that began the run, as it is typed."""
        return shlex.join(["soco-export", *self.argv[1:]])

    @staticmethod
    def load(root: Path) -> Manifest | None:
        """Read the manifest of the folder `root`, None if it has none; RecipeError if it is not one of ours."""
        path = root / MANIFEST
        if not path.exists():
            return None
        try:
            manifest = Manifest.model_validate_json(
                read_bytes(path, f"move it away and give soco-export repair {root}, or give another --out")
            )
        except ValidationError as error:
            raise RecipeError(
                f"{MANIFEST} is not a manifest of this version of soco-export",
                fix=f"was it damaged, move it away and give soco-export repair {root}; what another program or version "
                "wrote is left alone: move it away, or give another --out",
                where=str(path),
            ) from error
        if not manifest.written:  # made before files were listed apart from stages
            manifest.written = {
                name: file for stage in manifest.stages.values() for name, file in stage.outputs.items()
            }
        return manifest

    def save(self, root: Path) -> None:
        """Write the manifest of `root` atomically."""
        write_atomic(root / MANIFEST, self.model_dump_json(indent=2) + "\n")

    def check_own(self, root: Path, names: Iterable[str]) -> None:
        """Raise RecipeError if a file under `names`, which is to be replaced, is not the run's own, as it wrote it."""
        check_ours(root, names, self.known(), EDITED)

    def known(self) -> dict[str, list[FileRecord]]:
        """Return what the run wrote in each place: as it is listed now, and before a replacement that was cut off."""
        found: dict[str, list[FileRecord]] = {}
        for records in (self.written, self.earlier):
            for name, record in records.items():
                found.setdefault(name, []).append(record)
        return found

    def disown(self, stage: str) -> None:
        """Forget a stage, and that what it wrote is the run's own."""
        record = self.stages.pop(stage, None)
        for name in record.outputs if record else ():
            self.written.pop(name, None)

    def settle(self, root: Path) -> None:
        """Forget what a killed replacement left in `earlier`: what lies there now is what was written."""
        for name, before in self.earlier.items():
            path = root / name
            if path.is_file() and not path.is_symlink() and record_file(path, before).sha256 == before.sha256:
                self.written[name] = before
        self.earlier = {}


def places_elsewhere(root: Path) -> dict[str, Path]:
    """Return the folder of each stage of the run in `root` whose files are another run's; none without a manifest."""
    manifest = Manifest.load(root)
    places = manifest.homes if manifest else {}
    return {stage: Path(os.path.normpath(root / place)) for stage, place in places.items()}


def check_unchanged(root: Path, names: Iterable[str]) -> None:
    """Raise RecipeError if files that are to be read are not as the run in `root` wrote them.

    What the manifest does not list, or a folder without one, is taken as it is.
    """
    manifest = Manifest.load(root)
    if manifest is None:
        return
    if strangers := not_ours(root, [name for name in names if name in manifest.written], manifest.known()):
        raise RecipeError(
            f"{root} is not as its run wrote it: {', '.join(strangers)}",
            fix="put back what was written, or move it elsewhere and give the command that made the run again",
            where=str(root),
        )


def check_uncut(root: Path) -> None:
    """Raise RecipeError if a file of the run in `root` is not as long as it was written.

    What is gone is not asked for (a CI job may have the results alone), nor what people read, such as the model card.
    """
    manifest = Manifest.load(root)
    written = manifest.written if manifest else {}
    for name in (name for name in written if name not in REPORT_FILES and (root / name).is_file()):
        found, record = (root / name).stat().st_size, written[name]
        if found != record.bytes:
            raise RecipeError(
                f"{name} has {found:,} bytes, and {record.bytes:,} were written and measured",
                fix="put back what was written, or move it elsewhere and give the command that made the run again",
                where=str(root / name),
            )


def lock_hash(text: str) -> str:
    """Return what `Manifest.locks` has of a lock file."""
    return hashlib.sha256(text.encode()).hexdigest()


def stage_key(settings: Any, inputs: Mapping[str, str]) -> str:
    """Hash what a stage depends on: its settings (JSON-able) and its inputs' hashes by name."""
    text = json.dumps({"settings": settings, "inputs": dict(inputs)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_outputs(root: Path, outputs: Iterable[str], others: Iterable[str]) -> dict[str, FileRecord]:
    """Return records of all files that `outputs` (files or folders under `root`) hold, by path relative to `root`.

    `others` are paths that another stage owns although they lie in one of these folders (the model card in hf/).
    """
    owned_by_others = set(others)
    return {name: record for name, record in record_files(root, outputs).items() if name not in owned_by_others}


def why_stale(root: Path, record: StageRecord | None, keys: Collection[str]) -> str:
    """Return why a stage must run (again), "" if what it wrote into `root` under one of `keys` can be used as it is."""
    if record is None:
        return NEW
    if record.status != "done":
        return "was interrupted"
    if record.key not in keys:
        return "its settings or inputs changed"
    for name, known in record.outputs.items():
        path = root / name
        if not path.is_file():
            return f"{name} is gone"
        if record_file(path, known).sha256 != known.sha256:
            return f"{name} was changed"
    return ""
