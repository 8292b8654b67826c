"""The header of a safetensors file, read with bounds: names, dtypes and shapes, and whether the file is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from soco_train.bounded import open_plain, parse_object
from soco_train.errors import DataError

MOST_HEADER = 16 << 20  # bytes; a model of 50,000 tensors has about 6 MB
MOST_TENSORS = 100_000
LENGTH = 8
Placed = tuple[int, int, str, tuple[int, ...]]  # begin, end, dtype, shape
# of one number, by the names that safetensors has for types
_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds. tensors: name → (dtype as written, shape); metadata: text by name.

    places: name → (first byte in the file, the one behind the last).
    """

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]
    places: Mapping[str, tuple[int, int]]


def read_header(path: Path, fix: str) -> Header:
    """Return the header of `path`; DataError, which says `fix`, if the file is truncated or no safetensors.

    What is accepted here is what the library safetensors opens: each tensor has the bytes of its type and shape, and
    they lie one after the other to the end of the file.
    """
    with open_plain(path, fix) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(LENGTH), "little")
        if size < LENGTH or length > size - LENGTH:
            raise _broken(path, "it is truncated or corrupt (no safetensors header)", fix)
        if length > MOST_HEADER:
            raise _broken(path, f"its header of {length:,} bytes is larger than any model's", fix)
        data = file.read(length)
    found = parse_object(data, f"the header of {path.name}", str(path), fix)
    metadata = found.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _broken(path, "its metadata is not text", fix)
    if len(found) > MOST_TENSORS:
        raise _broken(path, f"it names {len(found):,} tensors, more than any model has", fix)
    start = LENGTH + length
    placed = {name: _tensor(path, name, entry, size - start, fix) for name, entry in found.items()}
    _check_places(path, placed, size - start, fix)
    tensors = {name: (dtype, shape) for name, (_, _, dtype, shape) in placed.items()}
    return Header(tensors, metadata, {name: (start + begin, start + end) for name, (begin, end, *_) in placed.items()})


def _check_places(path: Path, placed: Mapping[str, Placed], room: int, fix: str) -> None:
    """Raise DataError unless the tensors lie one after the other and fill the `room` bytes."""
    end = 0
    for name, (start, stop, *_) in sorted(placed.items(), key=lambda tensor: tensor[1][:2]):
        if start != end:
            raise _broken(path, f"{name[:200]} does not begin where the tensor before it ends", fix)
        end = stop
    if end != room:
        raise _broken(path, f"{room - end:,} bytes belong to no tensor", fix)


def _tensor(path: Path, name: str, entry: Any, room: int, fix: str) -> Placed:
    """Return (begin, end, dtype, shape) of one entry; `room` is how many bytes of numbers the file holds."""
    keys = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = keys.get("dtype"), _counts(keys.get("shape")), _counts(keys.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _broken(path, f"its entry for {name[:200]} has no dtype, shape and place", fix)
    if offsets[1] > room:
        raise _broken(path, f"it is truncated or corrupt: {offsets[1] - room:,} bytes of {name[:200]} are missing", fix)
    if dtype not in _BITS:
        raise _broken(path, f"{name[:200]} is of the type {dtype[:40]!r}, which safetensors does not have", fix)
    if prod(shape) * _BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise _broken(path, f"{name[:200]} has not the bytes of {dtype} {list(shape[:8])}", fix)
    return offsets[0], offsets[1], dtype, shape


def _counts(value: Any) -> tuple[int, ...] | None:
    """Return a list of counts, None if it is none."""
    good = isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    return tuple(value) if good else None


def _broken(path: Path, reason: str, fix: str) -> DataError:
    return DataError(f"cannot read {path.name}: {reason}", fix=fix, where=str(path))
