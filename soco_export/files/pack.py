r"""An exported folder as one compressed file for download, and back bit for bit.

    SOCOPACK1\n · bytes of the contents (8) · contents as JSON · of each file its blocks: width (1), and of each
    plane its bytes (4) and zstandard frame

The contents name each file with its size and SHA-256, and have one of their own; numbers are little-endian. An archive
is read as one that anybody may have made: sizes, counts and names are bounded before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from soco_export.files.coding import BLOCK, DAMAGED, decode, encode, load_zstandard, plane_lengths
from soco_export.files.names import MODEL_FILE
from soco_export.files.records import check_apart, no_file, record_file, walk
from soco_export.files.replacing import LISTING, check_replaceable, replacing_folder
from soco_export.files.text import one_line
from soco_train.bounded import open_plain, parse_object
from soco_train.errors import DataError, MachineError, RecipeError
from soco_train.events import Event, Notify, silent

MAGIC = b"SOCOPACK1\n"
SUFFIX = ".socopack"
MOST_CONTENTS = 4 << 20  # bytes of JSON; an export has some ten files, one of experts in shards some hundreds
MOST_FILES = 10_000
_LONGEST_NAME = 500
GIVE_PACK = "give a file that soco-export pack made"
# names that Windows would not take as a file's: an archive is to be unpacked anywhere
_FORBIDDEN = re.compile('[\\\\:*?"<>|\x00-\x1f\ud800-\udfff]')

Contents = Mapping[str, tuple[int, str]]  # file, relative → (bytes, SHA-256)


def pack_folder(folder: Path, out: Path, notify: Notify = silent) -> Contents:
    """Write `folder` as the archive `out`, which appears whole or not at all; return what it holds.

    The folder's own listing (soco_files.json) is left out: unpacking makes it anew.

    Raises RecipeError if `out` is there already, or `folder` holds no model or a link; MachineError without zstandard.
    """
    load_zstandard()
    files = _files_of(folder)
    check_apart(out, [folder])
    _check_new(out)
    contents = {name: (record.bytes, record.sha256) for name, record in ((n, record_file(p)) for n, p in files.items())}
    told = _Told("pack", sum(size for size, _ in contents.values()), notify)
    out.parent.mkdir(parents=True, exist_ok=True)
    number, partial = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent)
    try:
        with open(number, "wb") as file:
            _write(file, files, contents, told)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o666 & ~_umask())
        _put(Path(partial), out)
    finally:
        Path(partial).unlink(missing_ok=True)
    return contents


def _put(partial: Path, out: Path) -> None:
    """Give a file its name, unless there is something of that name by now; RecipeError then."""
    with suppress(OSError):
        os.link(partial, out)  # which, unlike a rename, never writes over anything
        return
    _check_new(out)  # it is there; else this is a disk without links
    os.rename(partial, out)


def unpack_file(archive: Path, out: Path, notify: Notify = silent) -> Contents:
    """Write the folder that `archive` holds as `out`, whole or not at all, every file checked by its SHA-256.

    Raises RecipeError if `out` is there already; DataError if the archive is damaged, or names files that lie
    elsewhere; MachineError without zstandard, or room.
    """
    load_zstandard()
    _check_free(out)
    check_replaceable(out)
    with open_plain(archive, GIVE_PACK) as file:
        contents = _read_contents(file, archive)
        total = sum(size for size, _ in contents.values())
        _check_room(total, out)
        told = _Told("unpack", total, notify)
        with replacing_folder(out) as partial:
            for name, (size, digest) in contents.items():
                _read_file(file, partial / name, size, digest, told)
            if file.read(1):
                raise DataError("the archive goes on after its last file", fix=DAMAGED, where=str(archive))
    return contents


class _Told:
    """How many of `total` bytes are done, told to `notify`."""

    def __init__(self, stage: str, total: int, notify: Notify) -> None:
        self.stage, self.total, self.notify, self.done = stage, total, notify, 0

    def add(self, count: int) -> None:
        self.done += count
        self.notify(Event(self.stage, self.done, self.total))


def _files_of(folder: Path) -> dict[str, Path]:
    """Return the folder's files by relative name, sorted; RecipeError if it holds no model, or a link."""
    if not any((folder / name).is_file() for name in ("config.json", MODEL_FILE)):
        raise RecipeError(f"{folder} holds no model", fix="give an onnx/ or hf/ folder of a run", where=str(folder))
    found = {path.relative_to(folder).as_posix(): path for path in walk(folder) if path != folder / LISTING}
    for name, path in found.items():
        if kind := no_file(path):
            raise RecipeError(
                f"{one_line(name)} is {kind}", fix="put the file itself in its place, or move it away", where=str(path)
            )
    for name, fault in _faults_of_names(found):
        raise RecipeError(f"{name!r} {fault}", fix="rename the file", where=str(folder))
    if len(found) > MOST_FILES:
        raise RecipeError(f"{folder} holds {len(found):,} files", fix="give an export's folder", where=str(folder))
    return dict(sorted(found.items()))


def _check_free(out: Path) -> None:
    """Raise RecipeError if a folder cannot appear as `out`, which is no empty one."""
    if out.is_symlink() or not out.is_dir() or any(out.iterdir()):
        _check_new(out)


def _check_new(out: Path) -> None:
    """Raise RecipeError if there is anything in the place of `out`."""
    if os.path.lexists(out):
        raise RecipeError(f"{out} is there already", fix="give another --out, or move it away", where="--out")


def _check_room(total: int, out: Path) -> None:
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if total > free:
        raise MachineError(
            f"the archive unpacks to {total:,} bytes, and {free:,} are free",
            fix="give an --out elsewhere",
            where="--out",
        )


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _write(file: BinaryIO, files: Mapping[str, Path], contents: Contents, told: _Told) -> None:
    table = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in contents.items()}
    text = _as_json({"files": table, "sha256": _digest(table)})
    file.write(MAGIC + len(text).to_bytes(8, "little") + text)
    for name, path in files.items():
        digest = hashlib.sha256()
        for block in _blocks(path):
            digest.update(block)
            width, frames = encode(block)
            file.write(bytes([width]) + b"".join(len(frame).to_bytes(4, "little") + frame for frame in frames))
            told.add(len(block))
        if digest.hexdigest() != contents[name][1]:
            raise DataError(
                f"{name} changed while it was packed", fix="pack again when it is finished", where=str(path)
            )


def _as_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _digest(table: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what the contents say of all files: their names are under no other one."""
    return hashlib.sha256(_as_json(table)).hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            yield block


def _read_contents(file: BinaryIO, archive: Path) -> Contents:
    """Return what an archive says it holds; DataError if that is nothing of ours or leads out of a folder."""
    if file.read(len(MAGIC)) != MAGIC:
        raise DataError(f"{archive.name} is no packed folder", fix=GIVE_PACK, where=str(archive))
    length = int.from_bytes(file.read(8), "little")
    if length > MOST_CONTENTS:
        raise DataError(f"{archive.name} has contents of {length:,} bytes", fix=DAMAGED, where=str(archive))
    told = parse_object(file.read(length), f"the contents of {archive.name}", str(archive), DAMAGED)
    found = told.get("files")
    if not isinstance(found, dict) or not 0 < len(found) <= MOST_FILES:
        raise DataError(f"{archive.name} names no files, or too many", fix=DAMAGED, where=str(archive))
    unknown = ((name, "has no size and SHA-256") for name, entry in found.items() if not _is_entry(entry))
    for name, fault in (*_faults_of_names(found), *unknown):
        raise DataError(f"{archive.name} names {name[:100]!r}, which {fault}", fix=DAMAGED, where=str(archive))
    if told.get("sha256") not in (None, _digest(found)):  # archives of before it was told have none
        raise DataError(
            f"the contents of {archive.name} are not what was packed (SHA-256)", fix=DAMAGED, where=str(archive)
        )
    return {name: (entry["bytes"], entry["sha256"]) for name, entry in found.items()}


def _faults_of_names(found: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yield each name that no system must be asked to write, and why."""
    # two names that differ in case or composition alone are one file on some systems; no file is another one's folder
    folded = Counter(map(_folded, found))
    folders = {str(parent) for name in folded for parent in PurePosixPath(name).parents}
    for name in found:
        if fault := _fault_of_name(name):
            yield name, fault
        elif folded[_folded(name)] > 1 or _folded(name) in folders:
            yield name, "is there twice"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _fault_of_name(name: str) -> str:
    parts = name.split("/")
    if any(part in ("", ".", "..") or part[-1] in ". " for part in parts):
        return "leads out of the folder, or is no plain path"
    if len(name) > _LONGEST_NAME or _FORBIDDEN.search(name):
        return "is too long, or has characters that not every system takes"
    return "is this program's own listing" if parts[0].casefold() == LISTING else ""


def _is_entry(entry: Any) -> bool:
    keys = entry if isinstance(entry, dict) else {}
    size, digest = keys.get("bytes"), keys.get("sha256")
    return type(size) is int and 0 <= size < 1 << 62 and isinstance(digest, str) and len(digest) == 64


def _read_file(file: BinaryIO, path: Path, size: int, digest: str, told: _Told) -> None:
    """Write one file of `size` bytes from the blocks that come next; DataError if its SHA-256 is another one."""
    found = hashlib.sha256()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as out:
        for count in _sizes(size):
            block = _read_block(file, count, path.name)
            found.update(block)
            out.write(block)
            told.add(count)
    if found.hexdigest() != digest:
        raise DataError(f"{path.name} is not what was packed (SHA-256)", fix=DAMAGED, where=path.name)


def _read_block(file: BinaryIO, size: int, name: str) -> bytes:
    try:
        width = _exactly(file, 1)[0]
        return decode([_read_frame(file) for _ in plane_lengths(size, width)], width, size)
    except DataError as error:
        error.where = name
        raise


def _read_frame(file: BinaryIO) -> bytes:
    length = int.from_bytes(_exactly(file, 4), "little")
    if length > 2 * BLOCK:  # zstandard adds a few bytes a frame at most
        raise DataError("the archive has a block that is too long", fix=DAMAGED)
    return _exactly(file, length)


def _sizes(size: int) -> Iterable[int]:
    return (min(BLOCK, size - start) for start in range(0, size, BLOCK))


def _exactly(file: BinaryIO, count: int) -> bytes:
    data = file.read(count)
    if len(data) != count:
        raise DataError("the archive ends too early", fix=DAMAGED)
    return data


def default_archive(folder: Path) -> Path:
    """Return where `pack` writes unless told: beside the folder, or beside its run and with the run's name.

    Raises RecipeError for the root of the file system, which lies beside nothing.
    """
    whole = folder.resolve()
    if not whole.name:
        raise RecipeError(f"{folder} has no name that the file could have", fix="say where with --out", where="--out")
    if whole.name in ("onnx", "hf") and whole.parent.name:
        return whole.parent.with_name(f"{whole.parent.name}-{whole.name}{SUFFIX}")
    return whole.with_name(whole.name + SUFFIX)


def default_folder(archive: Path) -> Path:
    """Return where `unpack` writes unless told: beside the archive, without its suffix; DataError for a root or "."."""
    if not archive.name:
        raise DataError(f"{archive} is a folder", fix=GIVE_PACK, where=str(archive))
    return archive.with_suffix("")
