"""Weights written a tensor at a time: the files that `save_pretrained` writes, without a model in memory.

A safetensors file is the length of its header, the header as JSON, and the numbers, so it can be written from shapes
alone and values that come one after the other. Larger numbers lie before smaller ones, as safetensors has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards

from soco_export.checkpoint.reader import is_finite
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


def write_shards(folder: Path, tensors: Mapping[str, Pending], max_shard_size: int | str, parameters: int) -> None:
    """Write `tensors` into `folder` as safetensors, with an index if they are more than one file.

    parameters: of the model, for the index. Raises DataError if a value is NaN or infinite.
    """
    split = split_torch_state_dict_into_shards(
        {name: tensor.meta for name, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: tensors[name] for name in names})
    if split.is_sharded:
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")


def write_file(path: Path, tensors: Mapping[str, Pending]) -> None:
    """Write one safetensors file."""
    order = sorted(tensors, key=lambda name: (-tensors[name].meta.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        meta, start = tensors[name].meta, end
        end += meta.nbytes
        header[name] = {"dtype": DTYPES[meta.dtype], "shape": list(meta.shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            file.write(_bytes(name, tensors[name]))


def _bytes(name: str, pending: Pending) -> memoryview:
    tensor = pending.read()
    if (tensor.shape, tensor.dtype) != (pending.meta.shape, pending.meta.dtype):
        raise DataError(f"{name} is not what was announced", fix="leave the run's files as they are", where=name)
    check_values(name, tensor)
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def check_values(name: str, tensor: torch.Tensor) -> None:
    """Raise DataError if `tensor` holds NaN or infinity."""
    if not is_finite(tensor):
        raise DataError(
            f"{name} holds NaN or infinity",
            fix="look for where it appears first: the base model, the calibration, or float16",
            where=name,
        )
