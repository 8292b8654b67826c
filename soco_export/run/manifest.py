"""manifest.json: what a run read, wrote and still owes, so that it resumes by itself and can be checked later.

A stage is done when the hash over everything it read (its key) and the hashes of everything it wrote still agree.
A file whose size and modification time are those on record is not read again: checking a 20 GB run takes no time.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from soco_train.errors import RecipeError

MANIFEST = "manifest.json"


class Record(BaseModel):
    """A part of the manifest; unknown keys are an error, so that a foreign file is not taken for ours."""

    model_config = ConfigDict(extra="forbid")


class FileRecord(Record):
    """One file as it was: `modified_ns` and `bytes` spare reading it again."""

    sha256: str
    bytes: int
    modified_ns: int


class StageRecord(Record):
    """`key` hashes the settings and inputs; `inputs` are hashes by name; `outputs` are files by path in the run."""

    status: Literal["running", "done"]
    key: str
    inputs: dict[str, str] = {}
    outputs: dict[str, FileRecord] = {}
    seconds: float = 0.0


class Process(Record):
    """Who works (or last worked) in the folder."""

    pid: int
    host: str
    started: str


class Manifest(Record):
    """The whole run. `inputs` are the files read from outside, by path; the recipe lies beside it as a lock file."""

    schema_version: Literal[1] = 1
    model: str
    argv: list[str]
    seed: int
    versions: dict[str, str]
    process: Process
    inputs: dict[str, FileRecord] = {}
    stages: dict[str, StageRecord] = {}

    @staticmethod
    def load(root: Path) -> Manifest | None:
        """Read the manifest of the folder `root`, None if it has none; RecipeError if it is not one of ours."""
        path = root / MANIFEST
        if not path.exists():
            return None
        try:
            return Manifest.model_validate_json(path.read_bytes())
        except ValidationError as error:
            raise RecipeError(
                f"{MANIFEST} is not a manifest of this version of soco-export",
                fix="give another --out, or start over with --fresh",
                where=str(path),
            ) from error

    def save(self, root: Path) -> None:
        """Write the manifest of `root` atomically."""
        write_atomic(root / MANIFEST, self.model_dump_json(indent=2) + "\n")


def write_atomic(path: Path, text: str) -> None:
    """Write `text` beside `path` and move it into place: a file with the final name is always whole."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def stage_key(settings: Any, inputs: Mapping[str, str]) -> str:
    """Hash what a stage depends on: its settings (JSON-able) and its inputs' hashes by name."""
    text = json.dumps({"settings": settings, "inputs": dict(inputs)}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def record_file(path: Path, known: FileRecord | None = None) -> FileRecord:
    """Return the record of `path`; its content is read only if size or time differ from `known`."""
    status = path.stat()
    if known and (known.bytes, known.modified_ns) == (status.st_size, status.st_mtime_ns):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    return FileRecord(sha256=digest.hexdigest(), bytes=status.st_size, modified_ns=status.st_mtime_ns)


def record_outputs(root: Path, outputs: Iterable[str], others: Iterable[str]) -> dict[str, FileRecord]:
    """Return records of all files that `outputs` (files or folders under `root`) hold, by path relative to `root`.

    `others` are paths that another stage owns although they lie in one of these folders (the model card in hf/).
    """
    owned_by_others = set(others)
    files = {path.relative_to(root).as_posix(): path for output in outputs for path in _files(root / output)}
    return {name: record_file(path) for name, path in sorted(files.items()) if name not in owned_by_others}


def _files(path: Path) -> Iterator[Path]:
    if path.is_dir():
        yield from (file for file in path.rglob("*") if file.is_file())
    elif path.exists():
        yield path


def why_stale(root: Path, record: StageRecord | None, key: str) -> str:
    """Return why a stage must run (again), "" if what it wrote into `root` can be used as it is."""
    if record is None:
        return "not run yet"
    if record.status != "done":
        return "was interrupted"
    if record.key != key:
        return "its settings or inputs changed"
    for name, known in record.outputs.items():
        path = root / name
        if not path.is_file():
            return f"{name} is gone"
        if record_file(path, known).sha256 != known.sha256:
            return f"{name} was changed"
    return ""
