"""A safetensors file written a tensor at a time, from values that need not exist before they are asked for.

The file is the length of its header, the header as JSON, and the numbers, so it can be written from shapes alone and
values that come one after the other. Larger numbers lie before smaller ones, as the library safetensors has them; it
reads what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soco_train.errors import DataError

DTYPES = {
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
        header[name] = {"dtype": DTYPES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
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
