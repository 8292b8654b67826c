"""A safetensors file written a tensor at a time, from values that need not exist before they are asked for.

The file is the length of its header, the header as JSON, and the numbers, so it can be written from shapes alone and
values that come one after the other. Larger numbers lie before smaller ones, as the library safetensors has them; it
reads what is written here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from soco_train.bounded import MADE_ANEW
from soco_train.errors import DataError
from soco_train.numbers.faults import check_numbers
from soco_train.store.arrays import read_said

_DTYPES = {
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Pending:
    """A tensor that is not in memory: how it looks, as a tensor on the meta device, and how to get it."""

    meta: torch.Tensor
    read: Callable[[], torch.Tensor]

    @staticmethod
    def of(tensor: torch.Tensor) -> Pending:
        """Return a tensor that is there already, on whatever device."""
        return Pending(tensor.detach().to("meta"), tensor.detach)


def checked(name: str, tensor: torch.Tensor | Pending) -> Pending:
    """Return a tensor that is looked at as it is read: DataError, naming it, for NaN, infinity and the like."""
    pending = tensor if isinstance(tensor, Pending) else Pending.of(tensor)
    return Pending(pending.meta, lambda: check_numbers(name, pending.read()))


def write_file(path: Path, tensors: Mapping[str, Pending], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file; tensors are asked for in the mapping's order, wherever in the file they lie.

    Raises DataError if a tensor is not what was announced.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].meta.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in order:
        meta, start = tensors[name].meta, end
        end += meta.nbytes
        header[name] = {"dtype": _DTYPES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        start_of_numbers = file.tell()
        for name, pending in tensors.items():
            file.seek(start_of_numbers + header[name]["data_offsets"][0])
            file.write(_bytes(name, pending))


def _bytes(name: str, pending: Pending) -> memoryview:
    tensor = pending.read()
    if (tensor.shape, tensor.dtype) != (pending.meta.shape, pending.meta.dtype):
        raise DataError(f"{name} is not what was announced", fix="leave the run's files as they are", where=name)
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | Pending], header: Mapping[str, Any]) -> None:
    """Write safetensors atomically, a tensor at a time, with `header` as JSON in the file's metadata.

    Processes may write the same file at the same time: each has its own partial one, and the last to finish stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    pending = {name: tensor if isinstance(tensor, Pending) else Pending.of(tensor) for name, tensor in tensors.items()}
    try:
        write_file(partial, pending, {"header": json.dumps(header, sort_keys=True)})
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_tensors(path: Path, kind: str, prefix: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, header) of a file written by `write_tensors`; DataError unless it is whole and of `kind`.

    prefix: what the names of the tensors to be read begin with.
    """
    _, header = read_said(path, kind)
    try:
        with safe_open(str(path), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 (safe_open is no mapping)
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path.name}: {error}", fix=MADE_ANEW, where=str(path)) from error
    return tensors, header
