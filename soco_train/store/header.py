"""The header of a safetensors file, read with bounds: names, dtypes and shapes, and whether the file is whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_train.bounded import open_plain, parse_object
from soco_train.errors import DataError

MOST_HEADER = 16 << 20  # bytes; a model of 50,000 tensors has about 6 MB
MOST_TENSORS = 100_000
LENGTH = 8


@dataclass(frozen=True)
class Header:
    """What a safetensors file says it holds. tensors: name → (dtype as written, shape); metadata: text by name."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    metadata: Mapping[str, str]


def read_header(path: Path, fix: str) -> Header:
    """Return the header of `path`; DataError, which says `fix`, if the file is truncated or no safetensors."""
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
    tensors = {name: _tensor(path, name, entry, size - LENGTH - length, fix) for name, entry in found.items()}
    return Header(tensors, metadata)


def _tensor(path: Path, name: str, entry: Any, room: int, fix: str) -> tuple[str, tuple[int, ...]]:
    """Return (dtype, shape) of one entry; `room` is how many bytes of numbers the file holds."""
    keys = entry if isinstance(entry, dict) else {}
    dtype, shape, offsets = keys.get("dtype"), _counts(keys.get("shape")), _counts(keys.get("data_offsets"))
    if not isinstance(dtype, str) or shape is None or offsets is None or len(offsets) != 2:
        raise _broken(path, f"its entry for {name[:200]} has no dtype, shape and place", fix)
    if offsets[1] > room:
        raise _broken(path, f"it is truncated or corrupt: {offsets[1] - room:,} bytes of {name[:200]} are missing", fix)
    return dtype, shape


def _counts(value: Any) -> tuple[int, ...] | None:
    """Return a list of counts, None if it is none."""
    good = isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 62 for item in value)
    return tuple(value) if good else None


def _broken(path: Path, reason: str, fix: str) -> DataError:
    return DataError(f"cannot read {path.name}: {reason}", fix=fix, where=str(path))
