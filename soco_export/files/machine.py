"""What a machine can refuse, in words: an operating system's error, from whichever library, becomes a MachineError.

with machine_limits("train", folder): ...
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from soco_train.errors import MachineError, SocoError

GO_ON = "; the same command goes on from what is done"
FREE = f"free some space, or give an --out elsewhere{GO_ON}"
# By errno: what happened, and what to do about it.
SAYINGS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", FREE),
    errno.EDQUOT: ("the disk quota is used up", FREE),
    errno.EFBIG: ("a file would be larger than is allowed here", f"raise the limit (ulimit -f){GO_ON}"),
    errno.EROFS: ("the file system is read-only", "mount it to be written, or give an --out that can be"),
    errno.EACCES: ("permission denied", "give yourself the right to it (chmod, chown), or give another path"),
    errno.EPERM: ("not permitted", "give yourself the right to it (chmod, chown, chattr), or give another path"),
    errno.EBUSY: ("in use, or a mount point", "give a folder below it"),
    errno.ENOTDIR: ("a part of the path is a file", "give a path whose parts are folders"),
    errno.EEXIST: ("something else is there", "give another path: a link that leads nowhere is such a thing"),
    errno.ENOENT: ("something on the path is not there", "create it; a link on the way may lead nowhere"),
    errno.ELOOP: ("links on the path lead in a circle", "give a path without them"),
    errno.ENAMETOOLONG: ("a name is too long for the file system", "give a shorter one, or a shorter --out"),
    errno.EMFILE: ("too many open files", f"raise the limit (ulimit -n){GO_ON}"),
    errno.EIO: ("the disk cannot be read or written", "look at the disk (dmesg), and give a path on another one"),
    errno.ENOMEM: ("out of memory", f"free some memory{GO_ON}"),
}
# A library written in Rust or C++ gives the number or the words only, and pathlib has its own for a circle of links.
_NUMBER = re.compile(r"os error (\d+)")
_WORDS = {os.strerror(number): number for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)}
_WORDS["Symlink loop"] = errno.ELOOP
# How torch and ONNX Runtime say that no memory is left; not on every device is there a type for it.
_NO_MEMORY = (
    "out of memory",
    "bad_alloc",
    "can't allocate",
    "cannot allocate",
    "unable to allocate",
    "failed to allocate",
)


def is_out_of_memory(error: Exception) -> bool:
    """Whether a library has got no memory, of whatever type its error is."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in _NO_MEMORY)


@contextmanager
def machine_limits(doing: str = "", where: object = "") -> Iterator[None]:
    """Turn what the operating system refuses within this context into MachineError, with the file it was about."""
    try:
        yield
    except Exception as error:
        found = machine_error(error, doing, where)
        if found is None or isinstance(error, SocoError):
            raise
        raise found from error


def machine_error(error: Exception, doing: str = "", where: object = "") -> MachineError | None:
    """Return what to say of an error that is the machine's, None if it is not."""
    number = _number(error)
    if number is None:
        return None
    said, fix = SAYINGS.get(number, (os.strerror(number), "look at the path and the machine; -v shows more"))
    files = [str(name) for name in (getattr(error, "filename", None), getattr(error, "filename2", None)) if name]
    return MachineError(f"{said}{f' ({doing})' if doing else ''}", fix=fix, where=" → ".join(files) or str(where))


def _number(error: Exception) -> int | None:
    """Return the errno of an error: its own, or the one its text names."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    named = _NUMBER.search(text)
    if named:
        return int(named[1])
    return next((number for words, number in _WORDS.items() if words in text), None)
