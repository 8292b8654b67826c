"""A lazy view of an HF folder's safetensors: names and shapes at once, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from soco_export.checkpoint.reader import check_layer_tensors, pruned_layers
from soco_export.checkpoint.record import QUANT_METHOD
from soco_export.files.json import read_config
from soco_export.files.safetensors import is_derived, open_shards, weight_files
from soco_export.files.wrapped import language_names
from soco_export.onnx.calibrate import KeptLevels
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.source import Place, Renamed, Shapes, StoredForm, places
from soco_export.onnx.write.matrix import CHUNK, Array, Stored
from soco_train.errors import DataError, RecipeError
from soco_train.numbers.blocks import Levels
from soco_train.numbers.faults import NONE, range_fault

HEADS = ("lm_head.", "embed_out.")  # outside of the base model, by whatever name it goes


def _called(layer: str, renamed: Renamed) -> str:
    """Return what a pruned layer is called here."""
    (name,) = places(f"{layer}.weight", (), renamed)
    return name.removesuffix(".weight")


class CheckpointWeights:
    """The tensors of an HF folder by name; headers are read and checked at once, numbers not before `read`.

    `transposed`: dense layers that are stored [inputs, outputs]; they are given out as all others, [outputs, inputs].
    `renamed`: (part of a name in the file, what it is called here). Several names are equal parts of a tensor's rows,
    and a name with `{}` is one for each entry of a first axis more. `prefix`: missing from every name in the file.
    `turned`: see `places`.
    """

    def __init__(
        self,
        folder: Path,
        transposed: Collection[str] = (),
        renamed: Renamed = (),
        prefix: str = "",
        turned: bool = False,
    ) -> None:
        self.folder = folder
        self.kept: KeptLevels | None = None
        self._transposed = frozenset(f"{name}.weight" for name in transposed)
        config = read_config(folder)
        _refuse_quantised(config.get("quantization_config") or {}, folder)
        layers = pruned_layers(config)
        self._transposed -= {f"{name}.weight" for name in layers}
        self.forms = {
            _called(name, renamed): StoredForm(layer["kind"], layer["rank"]) for name, layer in layers.items()
        }
        self._stored = open_shards(weight_files(folder))
        check_layer_tensors(self._stored, layers)
        self._places: dict[str, Place] = {}
        for name, alone in (language_names(self._stored) or dict(zip(self._stored, self._stored, strict=True))).items():
            before = "" if alone.startswith(HEADS) else prefix
            found = places(alone, tuple(self._stored[name].shape), renamed, before, turned)
            self._places |= {one: replace(place, name=name) for one, place in found.items()}
        self.shapes: Shapes = {name: self._shape(name) for name in self._places if not is_derived(name)}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._places[name].given
        return shape[::-1] if name in self._transposed else shape

    def rename(self, name: str, other: str) -> None:
        """Call the tensor `name` by the `other` name, if the files have none that is called so."""
        if name in self and other not in self:
            self._places[other], self.shapes[other] = self._places.pop(name), self.shapes.pop(name)

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def form(self, name: str) -> StoredForm:
        """Return how the Linear `name` is stored."""
        return self.forms.get(name, StoredForm())

    def levels(self, name: str) -> Levels | None:
        """Return how a matrix is rounded, if that has been found before."""
        return self.kept.get(name) if self.kept else None

    def read(self, name: str) -> Stored:
        """Return one tensor, floats as float32; DataError if it is unreadable or holds what it must not."""
        place = self._places[name]
        file = self._stored[place.name].file
        try:
            values = _read_tensor(str(file), place, place.turned or name in self._transposed)
            fault = _fault(values)
        except (SafetensorError, OSError) as error:
            raise DataError(f"cannot read {name}: {error}", fix="copy the checkpoint again", where=str(file)) from error
        if fault:
            raise DataError(f"{name} holds {fault}", fix="train or download the model anew", where=name)
        return values


class FileMatrix:
    """A matrix that lies in a file, float32 where it is looked at.

    The file is mapped anew for each look, so that no more of it counts as this process's memory than what is looked at.
    """

    def __init__(self, file: str, place: Place, transposed: bool = False) -> None:
        self._file, self._place, self._transposed = file, place, transposed
        self.shape = place.shape[::-1] if transposed else place.shape

    @property
    def nbytes(self) -> int:
        """Bytes that all of it would take."""
        return 4 * math.prod(self.shape)

    def __len__(self) -> int:
        """Return m."""
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        """Return rows, or columns with [:, columns]."""
        with safe_open(self._file, framework="pt") as shard:
            stored = shard.get_tensor(self._place.name)[self._place.index]
            found: Array = (stored.T if self._transposed else stored)[index].float().numpy()
        return found


def _read_tensor(file: str, place: Place, transposed: bool) -> Stored:
    with safe_open(file, framework="pt") as shard:
        if shard.get_slice(place.name).get_dtype() in ("F32", "BF16", "F16", "F64") and len(place.shape) == 2:
            return FileMatrix(file, place, transposed)
        tensor = shard.get_tensor(place.name)[place.index]
    return np.asarray((tensor.float() if tensor.is_floating_point() else tensor).numpy())


def _fault(values: Stored) -> str:
    """Return what is wrong with the numbers of a tensor, "" if nothing; looks at a piece of it at a time."""
    step = max(1, CHUNK * len(values) // max(1, values.nbytes))
    pieces = (values[start : start + step] for start in range(0, len(values), step))
    ends = [(float(piece.min()), float(piece.max())) for piece in pieces if piece.size]
    if not ends or not all(math.isfinite(end) for pair in ends for end in pair):
        return NONE if ends else ""
    return range_fault(min(low for low, _ in ends), max(high for _, high in ends), len(values.shape) > 1, torch.float32)


def _refuse_quantised(record: dict[str, object], folder: Path) -> None:
    if record and record.get("quant_method") != QUANT_METHOD:
        raise RecipeError(
            f"the checkpoint is quantised already ({record.get('quant_method')})",
            fix="start from the unquantised checkpoint and set export.weights",
            where=str(folder / "config.json"),
        )


def open_weights(folder: Path, architecture: Architecture | None) -> CheckpointWeights:
    """Return the tensors of `folder` under the names and in the shapes of its description.

    A base model saved without its head has names without the first part ("embed_tokens" for "model.embed_tokens"). Of
    a head and a token table that are one matrix, files may have either name.
    """
    if architecture is None:
        return CheckpointWeights(folder)
    tensors = architecture.tensors
    base, _, bare = f"{tensors.embed}.weight".partition(".")
    headless = bare in open_shards(weight_files(folder))
    prefix = f"{base}." if headless else ""
    weights = CheckpointWeights(folder, architecture.transposed(), tensors.stored, prefix, tensors.turned)
    if architecture.tied:
        weights.rename(f"{tensors.head}.weight", f"{tensors.embed}.weight")
    return weights
