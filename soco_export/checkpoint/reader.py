"""Reading a checkpoint folder with suspicion: every shard whole, every pruned tensor there, every number finite.

`check_folder` reads what is on disk and needs no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from soco_export.checkpoint.layers import QUANT_METHOD
from soco_train.errors import DataError

REPAIR = "copy or write the checkpoint again"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and how it looks, from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def check_folder(folder: Path) -> dict[str, StoredTensor]:
    """Return what the folder's safetensors hold, by tensor name; DataError unless all of it is usable.

    Reads every number once: none may be NaN or infinite, and the `order` of a pivoted layer must be a permutation.
    """
    layers = pruned_layers(read_config(folder))
    tensors = open_shards(shard_files(folder))
    check_layer_tensors(tensors, layers)
    for file in sorted({stored.file for stored in tensors.values()}):
        _check_values(file)
    return tensors


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json; DataError if it is absent or not a JSON object."""
    path = folder / "config.json"
    return _read_json(path, "give a folder written by save_checkpoint or save_pretrained")


def pruned_layers(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return name → kind, rank, bias of the pruned layers; empty for a dense checkpoint."""
    record = config.get("quantization_config") or {}
    return dict(record.get("layers", {})) if record.get("quant_method") == QUANT_METHOD else {}


def shard_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors files, as the index names them; DataError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index, REPAIR).get("weight_map", {}).values()))
    else:
        names = ["model.safetensors"]
    files = [folder / name for name in names]
    lost = [file.name for file in files if not file.is_file()]
    if lost or not files:
        raise DataError(f"{lost[0] if lost else 'every weight'} is missing", fix=REPAIR, where=str(folder))
    return files


def open_shards(files: Iterable[Path | str]) -> dict[str, StoredTensor]:
    """Return the headers of `files`, by tensor name; DataError if one is truncated or not safetensors."""
    tensors: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        try:
            with safe_open(str(file), framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 (safe_open is no mapping)
                    part = shard.get_slice(name)
                    tensors[name] = StoredTensor(file, tuple(part.get_shape()), part.get_dtype())
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {file.name}: {error}", fix=REPAIR, where=str(file)) from error
    return tensors


def check_layer_tensors(tensors: Mapping[str, StoredTensor], layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise DataError unless each pruned layer has its tensors, of shapes that agree with its rank."""
    for name, layer in layers.items():
        rank = layer["rank"]
        shapes = {part: _shape(tensors, f"{name}.{part}") for part in _parts(layer)}
        if layer["kind"] == "stacked":
            m = shapes["up.weight"][0]
            agree = shapes["weight"][0] == rank and shapes["up.weight"] == (m, rank)
            agree = agree and shapes.get("up.bias", (m,)) == (m,)
        else:
            (m,) = shapes["order"]
            agree = shapes["weight"][0] == rank and shapes["mix.weight"] == (m - rank, rank)
            agree = agree and shapes.get("bias", (m,)) == (m,)
        if not agree or rank >= m:
            raise DataError(
                f"the tensors of {name} do not make a {layer['kind']} layer of rank {rank}: {shapes}",
                fix=REPAIR,
                where=str(tensors[f"{name}.weight"].file),
            )


def _parts(layer: Mapping[str, Any]) -> tuple[str, ...]:
    if layer["kind"] == "stacked":
        return ("weight", "up.weight", "up.bias") if layer["bias"] else ("weight", "up.weight")
    return ("weight", "mix.weight", "order", "bias") if layer["bias"] else ("weight", "mix.weight", "order")


def _shape(tensors: Mapping[str, StoredTensor], name: str) -> tuple[int, ...]:
    if name not in tensors:
        files = sorted({stored.file.name for stored in tensors.values()})
        raise DataError(f"{name} is in none of {', '.join(files)}", fix=REPAIR, where=name)
    return tensors[name].shape


def is_finite(tensor: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite; takes no memory, which comparing each value would."""
    return not tensor.is_floating_point() or not tensor.numel() or bool(torch.stack(tensor.aminmax()).isfinite().all())


def _check_values(file: Path) -> None:
    with safe_open(str(file), framework="pt") as shard:
        for name in shard.keys():  # noqa: SIM118
            tensor = shard.get_tensor(name)
            if not is_finite(tensor):
                raise DataError(f"{name} in {file.name} holds NaN or infinity", fix=REPAIR, where=str(file))
            if name.endswith(".order") and not torch.equal(tensor.sort().values, torch.arange(len(tensor))):
                raise DataError(f"{name} in {file.name} is not a permutation", fix=REPAIR, where=str(file))


def _read_json(path: Path, fix: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path.name}: {error}", fix=fix, where=str(path)) from error
    if not isinstance(value, dict):
        raise DataError(f"{path.name} is not a JSON object", fix=fix, where=str(path))
    return value
