"""What this program wrote, by SHA-256: the only files that it ever deletes or replaces.

A file whose size and modification time are those on record is not read again: checking a 20 GB run takes no time.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from soco_train.errors import DataError, RecipeError

_SHOWN = 3  # files that an error names


class Record(BaseModel):
    """A part of a manifest; unknown keys are an error, so that a foreign file is not taken for ours."""

    model_config = ConfigDict(extra="forbid")


class FileRecord(Record):
    """One file as it was: `modified_ns` and `bytes` spare reading it again."""

    sha256: str
    bytes: int
    modified_ns: int


def record_file(path: Path, known: FileRecord | None = None) -> FileRecord:
    """Return the record of `path`; its content is read only if size or time differ from `known`.

    DataError for a pipe, a device or a folder: reading one may never end.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise DataError(f"{path.name} is no file", fix="put the file in its place, or move it away", where=str(path))
    if known and (known.bytes, known.modified_ns) == (status.st_size, status.st_mtime_ns):
        return known
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 18):
            digest.update(chunk)
    return FileRecord(sha256=digest.hexdigest(), bytes=status.st_size, modified_ns=status.st_mtime_ns)


def record_files(root: Path, names: Iterable[str]) -> dict[str, FileRecord]:
    """Return the records of all files that `names` (files or folders under `root`) hold, by path relative to `root`.

    DataError for a link among them, which no call of ours writes: what it leads to is another's.
    """
    files = {path.relative_to(root).as_posix(): path for name in names for path in walk(root / name)}
    for path in files.values():
        if kind := no_file(path):
            raise DataError(f"{path.name} is {kind}", fix="put the file itself in its place", where=str(path))
    return {name: record_file(path) for name, path in sorted(files.items())}


def walk(path: Path) -> Iterator[Path]:
    """Yield `path`, or all that is below it if it is a folder: files, links, pipes, sockets; no link is followed."""
    if path.is_dir() and not path.is_symlink():
        for inner in path.iterdir():
            yield from walk(inner)
    elif os.path.lexists(path):
        yield path


def no_file(path: Path) -> str:
    """Return what `path` is where it is no file of its own, "" where it is one."""
    return "a link" if path.is_symlink() else "" if path.is_file() else "a pipe or a device"


def _behind_link(root: Path, path: Path) -> str:
    """Return what is wrong with a file that a link among the folders on its way from `root` leads out to, else ""."""
    inner = path.relative_to(root).parents
    return "in a folder that is a link" if any((root / folder).is_symlink() for folder in inner[:-1]) else ""


def not_ours(root: Path, names: Iterable[str], known: Mapping[str, Iterable[FileRecord]]) -> list[str]:
    """Return the files under `names` that are not as `known` has them, each with why: these must not be touched.

    known: by path relative to `root`, the records under which a file counts as ours.
    """
    found = []
    for path in sorted(path for name in names for path in walk(root / name)):
        name = path.relative_to(root).as_posix()
        if kind := no_file(path) or _behind_link(root, path):
            found.append(f"{name} ({kind})")
        elif name not in known:
            found.append(f"{name} (not written by soco-export)")
        elif not any(record_file(path, record).sha256 == record.sha256 for record in known[name]):
            found.append(f"{name} (changed since it was written)")
    return found


def check_ours(root: Path, names: Iterable[str], known: Mapping[str, Iterable[FileRecord]], fix: str) -> None:
    """Raise RecipeError naming what lies under `names` and is not as `known` has it; nothing is touched."""
    strangers = not_ours(root, names, known)
    if strangers:
        more = f" and {len(strangers) - _SHOWN} more" if len(strangers) > _SHOWN else ""
        raise RecipeError(
            f"{root} holds what would be lost: {', '.join(strangers[:_SHOWN])}{more}", fix=fix, where=str(root)
        )


def check_apart(out: Path, inputs: Iterable[Path], where: str = "--out") -> None:
    """Raise RecipeError if `out` is a link, or is, contains or lies in a folder that is read."""
    if out.is_symlink():
        raise RecipeError(f"{out} is a link", fix=f"give what it leads to: {out.resolve()}", where=where)
    there = out.resolve()
    for source in inputs:
        origin = source.resolve()
        if there == origin or origin in there.parents or there in origin.parents:
            relation = "is" if there == origin else "lies in" if origin in there.parents else "contains"
            raise RecipeError(
                f"the output {out} {relation} the folder {source} that is read",
                fix="give a folder beside it: what is read is never written to",
                where=where,
            )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files under a folder; one that has several names there counts once."""
    found = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum({(file.st_dev, file.st_ino): file.st_size for file in found}.values())
