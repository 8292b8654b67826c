"""Files that `write_tensors` wrote: what they say of themselves, and their numbers as numpy has them, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soco_train.bounded import MADE_ANEW, parse_object
from soco_train.errors import DataError
from soco_train.store.header import Header, read_header

Provenance = Mapping[str, Any]
# by the names that safetensors has for types; float8 and what is smaller numpy does not know
_DTYPES = {
    **{f"F{bits}": f"<f{bits // 8}" for bits in (16, 32, 64)},
    **{f"{kind}{bits}": f"<{kind.lower()}{bits // 8}" for kind in "IU" for bits in (8, 16, 32, 64)},
    "BOOL": "?",
    "BF16": "<u2",
}


def read_said(path: Path, kind: str) -> tuple[Header, dict[str, Any]]:
    """Return (what the file says of its tensors, of itself); DataError unless it is whole and of `kind`."""
    header = read_header(path, MADE_ANEW)
    said = parse_object(header.metadata.get("header", "{}"), f"what {path.name} says of itself", str(path), MADE_ANEW)
    if said.get("kind") != kind:
        raise DataError(
            f"{path.name} holds {said.get('kind', 'something else')}, not {kind}",
            fix=f"give the {kind} file of a run folder",
            where=str(path),
        )
    return header, said


def layer_shape(name: str, shape: Any) -> tuple[int, int]:
    """Return (m, n) of a layer as a header has it; ValueError unless it is two counts: torch takes any number."""
    if not isinstance(shape, list) or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
        raise ValueError(f"{name} is of the shape {str(shape)[:60]}")
    return shape[0], shape[1]


def read_arrays(path: Path, kind: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Return (arrays, header) of a file as `read_tensors` does; they are pages of the file, those of bfloat16 float32.

    DataError too for a type that numpy does not have.
    """
    header, said = read_said(path, kind)
    try:
        pages = np.asarray(np.memmap(path, np.uint8, "r"))
    except OSError as error:
        raise DataError(f"cannot read {path.name}: {error}", fix=MADE_ANEW, where=str(path)) from error
    arrays = {}
    for name, (dtype, shape) in header.tensors.items():
        if dtype not in _DTYPES:
            raise DataError(f"cannot read {path.name}: {name} is of the type {dtype}", fix=MADE_ANEW, where=str(path))
        begin, end = header.places[name]
        array = pages[begin:end].view(_DTYPES[dtype]).reshape(shape)
        arrays[name] = (array.astype("<u4") << 16).view("<f4") if dtype == "BF16" else array
    return arrays, said
