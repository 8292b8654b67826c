"""Reading a checkpoint folder with suspicion: every shard whole, every pruned tensor there, every number finite.

`check_folder` reads what is on disk and needs no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from soco_export.checkpoint.record import QUANT_METHOD
from soco_export.files.json import read_config
from soco_export.files.safetensors import REPAIR, StoredTensor, open_shards, weight_files
from soco_train.errors import DataError
from soco_train.forms.base import FORMS
from soco_train.forms.registry import state_of
from soco_train.numbers.faults import number_fault

_FLOATS = ("F16", "BF16", "F32", "F64")  # what factors are stored in


def check_checkpoint(folder: Path) -> dict[str, StoredTensor]:
    """Return what the folder's safetensors hold, by tensor name; DataError unless all of it is usable.

    Reads every number once: none may be NaN or infinite, and the `order` of a pivoted layer must be a permutation.
    """
    layers = pruned_layers(read_config(folder))
    tensors = open_shards(weight_files(folder))
    check_layer_tensors(tensors, layers)
    for file in sorted({stored.file for stored in tensors.values()}):
        _check_values(file)
    return tensors


def pruned_layers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name → kind, rank, bias of the pruned layers; empty for a dense checkpoint.

    Raises DataError for a record that is not as `record_layers` writes it.
    """
    record = config.get("quantization_config") or {}
    if not isinstance(record, dict):
        raise DataError("quantization_config is no table", fix=REPAIR, where="config.json: quantization_config")
    return checked_record(record.get("layers", {})) if record.get("quant_method") == QUANT_METHOD else {}


def checked_record(layers: Any) -> dict[str, dict[str, Any]]:
    """Return the record of pruned layers; DataError unless each has its kind, rank and bias."""
    if not isinstance(layers, dict):
        raise DataError(
            "the record of pruned layers is no table", fix=REPAIR, where="config.json: quantization_config.layers"
        )
    for name, layer in layers.items():
        whole = isinstance(layer, dict) and type(layer.get("rank")) is int and type(layer.get("bias")) is bool
        if not whole or layer.get("kind") not in tuple(FORMS) or layer["rank"] < 1:
            raise DataError(
                f"the record of {name} is {layer!r}; it needs kind ({' or '.join(FORMS)}), rank (≥ 1) and bias",
                fix=REPAIR,
                where=f"config.json: quantization_config.layers.{name}",
            )
    return layers


def check_layer_tensors(tensors: Mapping[str, StoredTensor], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError unless each pruned layer has its tensors, of shapes that agree with its rank."""
    for name, layer in layers.items():
        kind, rank = layer["kind"], layer["rank"]
        module = FORMS[kind].module
        n = (0, *_shape(tensors, f"{name}.{module.width_part}"))[-1]
        m = (*_shape(tensors, f"{name}.{module.height_part}"), 0)[0]
        needed = state_of(kind, m, n, rank, layer["bias"]) if rank < module.full_rank(m, n) else {}
        shapes = {part: _shape(tensors, f"{name}.{part}") for part in needed}
        if not needed or any(shapes[part] != tuple(blank.shape) for part, blank in needed.items()):
            raise DataError(
                f"the tensors of {name} do not make a {kind} layer of rank {rank}: {shapes}",
                fix=REPAIR,
                where=str(tensors[f"{name}.weight"].file),
            )


def _shape(tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        files = sorted({stored.file.name for stored in tensors.values()})
        raise DataError(f"{name} is in none of {', '.join(files)}", fix=REPAIR, where=name)
    stored = tensors[name]
    if (stored.dtype not in _FLOATS) != name.endswith(".order"):
        raise DataError(f"{name} is stored as {stored.dtype}", fix=REPAIR, where=str(stored.file))
    return stored.shape


def _check_values(file: Path) -> None:
    with safe_open(str(file), framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118
            tensor = shard.get_tensor(name)
            if fault := number_fault(tensor):
                raise DataError(f"{name} in {file.name} holds {fault}", fix=REPAIR, where=str(file))
            if name.endswith(".order") and not torch.equal(tensor.sort().values, torch.arange(len(tensor))):
                raise DataError(f"{name} in {file.name} is not a permutation", fix=REPAIR, where=str(file))
