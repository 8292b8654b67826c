"""A lazy view of an HF folder's safetensors: names and shapes at once, one tensor in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from soco_export.onnx.architecture import Architecture
from soco_train.errors import DataError

# Older checkpoints store buffers that are computed from the config.
DERIVED = (".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")
# What each form of a Linear stores: (always, perhaps).
PARTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "dense": (("weight",), ("bias",)),
    "stacked": (("weight", "up.weight"), ("up.bias",)),
    "pivoted": (("weight", "mix.weight", "order"), ("bias",)),
}


@dataclass(frozen=True)
class Form:
    """How one Linear is stored: `dense`, `stacked` or `pivoted`; `rank` is 0 for dense."""

    kind: str = "dense"
    rank: int = 0


class CheckpointWeights:
    """The tensors of `folder` by name; nothing is read before `read`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.forms = _forms(folder)
        self._files = _index(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in sorted(set(self._files.values())):
            with _opened(file) as tensors:
                present = set(tensors.keys())
                for name in (name for name, home in self._files.items() if home == file):
                    if name not in present:
                        raise _broken(file, f"{name} is missing")
                    self.shapes[name] = tuple(tensors.get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def names(self) -> set[str]:
        """Return the names of all tensors that are weights."""
        return {name for name in self._files if not name.endswith(DERIVED)}

    def form(self, name: str) -> Form:
        """Return how the Linear `name` is stored."""
        return self.forms.get(name, Form())

    def read(self, name: str) -> np.ndarray[Any, np.dtype[Any]]:
        """Return one tensor, floats as float32; DataError if it is unreadable or not finite."""
        if name not in self._files:
            raise DataError(f"the checkpoint has no tensor {name}", fix="give a complete checkpoint", where=name)
        # Opened anew for each tensor, so that the pages of the last one are let go.
        with _opened(self._files[name]) as tensors:
            tensor = tensors.get_tensor(name)
        if not tensor.is_floating_point():
            return np.asarray(tensor.numpy())
        values = np.asarray(tensor.to(torch.float32).numpy())
        # A sum is finite only if every term is, and needs no second array.
        with np.errstate(over="ignore", invalid="ignore"):
            if not np.isfinite(values.sum(dtype=np.float64)):
                raise DataError(f"{name} holds NaN or infinity", fix="train or download the model anew", where=name)
        return values


def _index(folder: Path) -> dict[str, Path]:
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        entries: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: folder / file for name, file in entries.items()}
    if not single.exists():
        raise DataError(
            f"{folder.name} holds no safetensors",
            fix="save the model with save_pretrained, which writes model.safetensors",
            where=str(folder),
        )
    with _opened(single) as tensors:
        return dict.fromkeys(tensors.keys(), single)


def _forms(folder: Path) -> dict[str, Form]:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config") or {}
    if not stored:
        return {}
    if stored.get("quant_method") != "soco-export":
        raise DataError(
            f"the checkpoint is quantised already ({stored.get('quant_method')})",
            fix="start from the unquantised checkpoint and set export.weights",
            where=str(folder / "config.json"),
        )
    return {name: Form(layer["kind"], layer["rank"]) for name, layer in stored["layers"].items()}


def _opened(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt")
    except (SafetensorError, OSError) as error:
        raise _broken(file, str(error)) from error


def _broken(file: Path, reason: str) -> DataError:
    return DataError(f"cannot read {file.name}: {reason}", fix="download or save the model anew", where=str(file))


def check_tensors(architecture: Architecture, source: CheckpointWeights) -> None:
    """Raise DataError unless the checkpoint holds exactly the tensors that the description uses.

    A tensor too many is a part of the model that the graph would leave out.
    """
    needed, allowed = _expected(architecture, source)
    present = source.names()
    if missing := sorted(needed - present):
        raise DataError(
            f"the checkpoint lacks {len(missing)} tensors, {missing[0]} first",
            fix="give a complete checkpoint of the architecture that config.json names",
            where=str(source.folder),
        )
    if unknown := sorted(present - needed - allowed):
        raise DataError(
            f"the description of {architecture.family} has no place for {unknown[0]} ({len(unknown)} such tensors)",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families.py",
            where=str(source.folder),
        )


def _expected(architecture: Architecture, source: CheckpointWeights) -> tuple[set[str], set[str]]:
    """Return (needed, allowed besides): biases are used wherever they are stored."""
    names = architecture.names
    norms = [names.final_norm]
    for index in range(architecture.layers):
        inside = (names.attention_norm, names.mlp_norm, names.query_norm, names.key_norm)
        norms += [f"{names.layer.format(index)}.{name}" for name in inside if name]
    needed = {f"{name}.weight" for name in (names.embed, names.positions, *norms) if name}
    if architecture.norm.kind == "layer":
        needed |= {f"{name}.bias" for name in norms}
    allowed: set[str] = set()
    for name in architecture.linears():
        if architecture.tied and name == names.head:
            allowed |= {f"{name}.weight"}
            continue
        parts, biases = PARTS[source.form(name).kind]
        needed |= {f"{name}.{part}" for part in parts}
        allowed |= {f"{name}.{part}" for part in biases}
    return needed, allowed
