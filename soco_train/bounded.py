"""Reading a file that anybody may have made: bounded in size, depth and count, and every fault of it is a DataError.

Only plain files are opened, so that a pipe or a device keeps nobody waiting. Links are followed: a hub's cache is made
of them.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from soco_train.errors import DataError

MADE_ANEW = "delete it and give the same command again: the run makes it anew"  # the fix of a damaged file of a run
MOST_BYTES = 64 << 20
DEEPEST = 64  # JSON deeper than this is no file of a model, and breaks those who walk it by recursion
MOST_VALUES = 8_000_000
LFS_POINTER = b"version https://git-lfs"
REASONS = {
    errno.ENOENT: "there is no such file",
    errno.ENOTDIR: "there is no such file",
    errno.EACCES: "its permissions do not let you read it",
    errno.EPERM: "its permissions do not let you read it",
    errno.ELOOP: "it is a link that leads in a circle",
    errno.EISDIR: "it is a folder",
    errno.ENAMETOOLONG: "its name is too long for the file system",
}
FIXES = {
    errno.EACCES: "let yourself read it (chmod u+r), or ask its owner",
    errno.EPERM: "let yourself read it (chmod u+r), or ask its owner",
}


def open_plain(path: Path, fix: str) -> BufferedReader:
    """Open a plain file to read its bytes; DataError for anything else, a file that may not be read, and a pointer.

    fix: what to do where the file is absent or not what it must be.
    """
    try:
        number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        raise _unreadable(path, error, fix) from error
    found = os.fstat(number)
    if not stat.S_ISREG(found.st_mode):
        kind = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe or a device"
        os.close(number)
        raise DataError(f"cannot read {_name(path)}: it is {kind}", fix=fix, where=str(path))
    file = os.fdopen(number, "rb")
    try:
        _check_start(file, path, found.st_size, fix)
    except OSError as error:
        file.close()
        raise _unreadable(path, error, fix) from error
    except DataError:
        file.close()
        raise
    return file


def _check_start(file: BufferedReader, path: Path, size: int, fix: str) -> None:
    start = file.peek(len(LFS_POINTER))
    if start.startswith(LFS_POINTER):
        raise DataError(f"{path.name} is a git-lfs pointer, not the file itself", fix="git lfs pull", where=str(path))
    if start and not size:  # in /proc, where reading may wait, fail, or have no end
        raise DataError(f"cannot read {path.name}: it is no file on a disk", fix=fix, where=str(path))


def _name(path: Path) -> str:
    return path.name or str(path)


def _unreadable(path: Path, error: OSError | ValueError, fix: str) -> DataError:
    number = getattr(error, "errno", None) or 0
    reason = REASONS.get(number, getattr(error, "strerror", None) or str(error))
    return DataError(f"cannot read {_name(path)}: {reason}", fix=FIXES.get(number, fix), where=str(path))


def read_bytes(path: Path, fix: str, most: int = MOST_BYTES) -> bytes:
    """Return the bytes of a plain file; DataError if they are more than `most` or cannot be read."""
    with open_plain(path, fix) as file:
        try:
            data = file.read(most + 1)
        except OSError as error:
            raise _unreadable(path, error, fix) from error
    if len(data) > most:
        raise DataError(f"cannot read {path.name}: it is larger than {most >> 20} MB", fix=fix, where=str(path))
    return data


def read_text(path: Path, fix: str, most: int = MOST_BYTES) -> str:
    """Return a plain file of UTF-8 text; DataError if it is none."""
    try:
        return read_bytes(path, fix, most).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"cannot read {path.name}: it is not UTF-8 ({error.reason})", fix=fix, where=str(path)
        ) from error


def read_json(path: Path, fix: str, most: int = MOST_BYTES) -> dict[str, Any]:
    """Return the JSON object in `path`; DataError if it is none, or larger or deeper than such a file can be."""
    return parse_object(read_bytes(path, fix, most), path.name, str(path), fix)


def parse_object(data: bytes | str, name: str, where: str, fix: str) -> dict[str, Any]:
    """Return the JSON object in `data`; DataError, which says `name`, `where` and `fix`, if there is none.

    Infinity and NaN become what transformers 5 writes for them, {"__float__": "Infinity"}: no text of ours has them.
    """
    try:
        text = data if isinstance(data, str) else data.decode("utf-8")
        value = json.loads(text, parse_constant=lambda word: {"__float__": word})
        if "\\ud" in text.lower():  # half of a pair of surrogates is no character
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError:
        raise DataError(f"cannot read {name}: it is nested too deeply", fix=fix, where=where) from None
    except ValueError as error:
        raise DataError(f"cannot read {name}: it is not JSON ({str(error)[:200]})", fix=fix, where=where) from error
    if not isinstance(value, dict):
        raise DataError(f"cannot read {name}: it is not a JSON object", fix=fix, where=where)
    _check_shape(value, name, where, fix)
    return value


def _check_shape(value: dict[str, Any], name: str, where: str, fix: str) -> None:
    """Raise DataError if `value` is nested too deeply or holds too many values; goes by levels, without recursion."""
    level: list[Any] = [value]
    total = 0
    for _ in range(DEEPEST):
        total += sum(map(len, level))
        if total > MOST_VALUES:
            raise DataError(f"cannot read {name}: it holds more than {MOST_VALUES:,} values", fix=fix, where=where)
        inner = (part for box in level for part in (box.values() if isinstance(box, dict) else box))
        level = [part for part in inner if isinstance(part, dict | list)]
        if not level:
            return
    raise DataError(f"cannot read {name}: it is nested more than {DEEPEST} deep", fix=fix, where=where)


def answering(what: str, where: str, fix: str, make: Callable[[], Any]) -> Any:
    """Return what `make` returns; whatever it finds wrong with its input, our own errors apart, is a DataError.

    For values whose structure a constructor checks by taking it apart.
    """
    try:
        return make()
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{what}: {' '.join(str(error).split())[:200]}", fix=fix, where=where) from error
