"""A folder that appears whole or not at all, and replaces only what an earlier call of ours wrote there.

Each folder lists its files by hash in soco_files.json. The new one is made beside the old one and swapped in by two
renames; a death between them leaves the old one under a hidden name, from which the next call puts it back.
"""

from __future__ import annotations

import errno
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import psutil
from pydantic import Field, ValidationError

from soco_export.files.atomic import remove, write_atomic
from soco_export.files.records import FileRecord, Record, check_apart, check_ours, record_files
from soco_train.bounded import read_bytes
from soco_train.errors import DataError, RecipeError

LISTING = "soco_files.json"
_FIX = "give another --out, or move these files away"
_SECONDS = 2  # how exactly a process's start is known: it is told from the second in which the machine started


class Listing(Record):
    """The SHA-256 of each file of a folder that is whole, or the process that is making it.

    No dates: the same model gives the same listing.
    """

    schema_version: Literal[1] = 1
    files: dict[str, str] = Field(default_factory=dict)
    making: str = ""

    @staticmethod
    def load(folder: Path) -> Listing | None:
        """Return the listing of `folder`, None if it has none of ours."""
        path = folder / LISTING
        if path.is_symlink() or not path.is_file():
            return None
        try:
            return Listing.model_validate_json(read_bytes(path, _FIX))
        except (DataError, ValidationError):
            return None

    def save(self, folder: Path) -> None:
        """Write the listing of `folder`."""
        write_atomic(folder / LISTING, json.dumps(self.model_dump(exclude_defaults=True), indent=2) + "\n")

    def check(self, folder: Path) -> None:
        """Raise RecipeError if `folder` holds anything that is not listed, or not as it is listed."""
        known = {name: [FileRecord(sha256=digest, bytes=-1, modified_ns=-1)] for name, digest in self.files.items()}
        check_ours(folder, [path.name for path in folder.iterdir() if path.name != LISTING or not known], known, _FIX)


def check_replaceable(out: Path) -> None:
    """Raise RecipeError unless `out` is free, empty, or to the file what an earlier call wrote; reads only.

    RecipeError also while another process is writing there.
    """
    _check_place(out)
    for path, listing in _beside(Path(os.path.abspath(out))):
        if listing.making != _me() and _lives(path, listing.making):
            raise RecipeError(
                f"{out} is being written by another process ({listing.making})",
                fix=f"wait for it, or give another --out; has it ended, delete {path}",
                where=str(out),
            )


def _check_place(out: Path) -> None:
    check_apart(out, ())
    if not out.exists():
        return
    if not out.is_dir():
        raise RecipeError(f"{out} is a file", fix="give another --out", where=str(out))
    if os.path.ismount(out):
        raise RecipeError(
            f"{out} is a mount point, which cannot be replaced as a whole", fix="give a folder below it", where="--out"
        )
    if out.resolve() == Path.cwd():
        raise RecipeError(f"{out} is the working directory", fix="give a folder below or beside it", where="--out")
    (Listing.load(out) or Listing()).check(out)


@contextmanager
def replacing_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block ends well, and vanishes if it fails.

    RecipeError if `out` holds anything but what an earlier call wrote there, unchanged; it is then left as it is, and
    so is, where it was free at first, what another process wrote there meanwhile.
    """
    out = Path(os.path.abspath(out))
    _settle(out)
    check_replaceable(out)
    replaces = out.exists()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    old = partial.with_suffix(".old")
    try:
        Listing(making=_me()).save(partial)
        yield partial
        _give_usual_mode(partial)
        remove(partial / LISTING)
        Listing(files={name: record.sha256 for name, record in record_files(partial, ["."]).items()}).save(partial)
        if replaces and out.exists():
            _check_place(out)
            _rename(out, old, out)
        _rename(partial, out, out)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        remove(partial)
        if old.exists():
            remove(old)


def _rename(source: Path, target: Path, out: Path) -> None:
    """Rename a folder; RecipeError where another process was faster."""
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT, errno.ENOTDIR):
            raise
        raise RecipeError(
            f"{out} was written by another process meanwhile, and is left as it is",
            fix="look at what lies there, or give another --out",
            where=str(out),
        ) from error


def _beside(out: Path) -> list[tuple[Path, Listing]]:
    """Return the folders that calls for `out` are making beside it, or have left there."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.\w+\.(old|partial)")
    left = [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)] if out.parent.is_dir() else []
    found = ((path, None if path.is_symlink() else Listing.load(path)) for path in left)
    return [(path, listing) for path, listing in found if listing is not None]


def _settle(out: Path) -> None:
    """Finish what killed calls left beside `out`: put the last good folder back, remove what they had made."""
    for path, listing in _beside(out):
        if listing.making:
            if _lives(path, listing.making) is False:
                remove(path)
        elif not out.exists():
            os.rename(path, out)
        else:
            with suppress(RecipeError):
                listing.check(path)
                remove(path)


def _me() -> str:
    return f"{os.getpid()}@{socket.gethostname()}"


def _lives(path: Path, process: str) -> bool | None:
    """Tell whether the process that is making `path`, as `_me` names it, is at work; None if it is none of this host.

    A process younger than the listing is another one, to which the number was given anew.
    """
    number, _, host = process.partition("@")
    if host != socket.gethostname():
        return None
    try:
        there = psutil.pid_exists(int(number))
        return there and psutil.Process(int(number)).create_time() <= (path / LISTING).stat().st_mtime + _SECONDS
    except psutil.NoSuchProcess:
        return False
    except (ValueError, OverflowError, OSError, psutil.Error):  # no number, or one that no process can have
        return None


def _give_usual_mode(folder: Path) -> None:
    """Give a folder that mkdtemp made, which is private, the mode that the umask gives new folders."""
    sample = folder / ".mode"
    sample.mkdir()
    folder.chmod(sample.stat().st_mode)
    sample.rmdir()
