"""A lazy view of an HF folder's safetensors: names and shapes at once, one tensor in memory at a time."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from soco_export.checkpoint.reader import check_layer_tensors, pruned_layers
from soco_export.checkpoint.record import QUANT_METHOD
from soco_export.files.json import read_config
from soco_export.files.safetensors import open_shards, weight_files
from soco_export.onnx.calibrate import KeptLevels
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.write.matrix import CHUNK, Array, Stored
from soco_train.errors import DataError, RecipeError
from soco_train.forms.base import FORMS
from soco_train.forms.registry import state_of
from soco_train.numbers.blocks import Levels
from soco_train.numbers.faults import NONE, range_fault

HEADS = ("lm_head.", "embed_out.")  # outside of the base model, by whatever name it goes
# Older checkpoints store buffers that are computed from the config.
DERIVED = (".rotary_emb.inv_freq", ".attn.bias", ".attention.bias", ".masked_bias")
Shapes = dict[str, tuple[int, ...]]
Renamed = Sequence[tuple[str, tuple[str, ...]]]


@dataclass(frozen=True)
class StoredForm:
    """How one Linear is stored: `dense`, or the name of a storage form; `rank` is 0 for dense."""

    kind: str = "dense"
    rank: int = 0

    @property
    def bias(self) -> str:
        """The name of its bias, below that of the layer."""
        return FORMS[self.kind].module.bias_part if self.rank else "bias"

    @property
    def order(self) -> str | None:
        """The name of the tensor that says in which order the outputs come, if there is one."""
        return FORMS[self.kind].module.order_part if self.rank else None


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies: `index` of the stored tensor `name`, of `shape` there and the transpose of it `turned`."""

    name: str
    index: Any
    shape: tuple[int, ...]
    turned: bool = False

    @property
    def given(self) -> tuple[int, ...]:
        """The shape in which it is given out."""
        return self.shape[::-1] if self.turned else self.shape


def places(
    name: str, shape: tuple[int, ...], renamed: Renamed, prefix: str = "", turned: bool = False
) -> dict[str, _Place]:
    """Return what a stored tensor is called here, with its place; a stack of experts has many names.

    turned: matrices of a stack are [inputs, outputs], and outputs of several names come in turn.
    """
    names = [f"{prefix}{name}"]
    for part, instead in renamed:
        names = [one.replace(part, new, 1) for one in names for new in (instead if part in one else (part,))]
    if len(names) == 1 and "{}" not in names[0]:
        return {names[0]: _Place(name, ..., shape)}
    count, found = len(names), {}
    rows = shape[-1 if turned else 1] // count
    for expert in range(shape[0]):
        for index, one in enumerate(names):
            if turned:
                place = _Place(name, (expert, ..., slice(index, None, count)), (*shape[1:-1], rows), len(shape) > 2)
            else:
                place = _Place(name, (expert, slice(index * rows, (index + 1) * rows)), (rows, *shape[2:]))
            found[one.format(expert)] = place
    return found


def _called(layer: str, renamed: Renamed) -> str:
    """Return what a pruned layer is called here."""
    (name,) = places(f"{layer}.weight", (), renamed)
    return name.removesuffix(".weight")


class WeightSource(Protocol):
    """What the graph builder reads from: the form of each Linear, shapes by tensor name, and tensors."""

    shapes: Shapes

    def __contains__(self, name: str) -> bool:
        """Whether there is a tensor `name`."""

    def form(self, name: str) -> StoredForm:
        """Return how the Linear `name` is stored."""

    def read(self, name: str) -> Stored:
        """Return one tensor, floats as float32."""

    def levels(self, name: str) -> Levels | None:
        """Return how a matrix is rounded, if that has been found before."""


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
        self._places: dict[str, _Place] = {}
        for name, stored in self._stored.items():
            before = "" if name.startswith(HEADS) else prefix
            self._places |= places(name, tuple(stored.shape), renamed, before, turned)
        self.shapes: Shapes = {name: self._shape(name) for name in self._places if not name.endswith(DERIVED)}

    def _shape(self, name: str) -> tuple[int, ...]:
        shape = self._places[name].given
        return shape[::-1] if name in self._transposed else shape

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


class BlankWeights:
    """Shapes without numbers: enough to count the bytes of a graph that is not written.

    `shapes`: of the dense model's tensors, under the names of its files; `forms`: of the pruned layers, and whether
    each has a bias.
    """

    def __init__(
        self,
        architecture: Architecture,
        shapes: Mapping[str, tuple[int, ...]],
        forms: Mapping[str, tuple[StoredForm, bool]],
    ) -> None:
        self.shapes: Shapes = {}
        for name, shape in shapes.items():
            found = places(name, shape, architecture.tensors.stored, turned=architecture.tensors.turned)
            self.shapes |= {one: place.given for one, place in found.items()}
        for name in architecture.transposed():
            self.shapes[f"{name}.weight"] = self.shapes[f"{name}.weight"][::-1]
        self._forms = {name: form for name, (form, _) in forms.items()}
        for name, (form, bias) in forms.items():
            m, n = self.shapes.pop(f"{name}.weight")
            self.shapes.pop(f"{name}.bias", None)
            parts = state_of(form.kind, m, n, form.rank, bias)
            self.shapes |= {f"{name}.{part}": tuple(blank.shape) for part, blank in parts.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def form(self, name: str) -> StoredForm:
        """Return how the Linear `name` is stored."""
        return self._forms.get(name, StoredForm())

    def read(self, name: str) -> Stored:
        """Return zeros that take no memory, or an order that is not the usual one."""
        shape = self.shapes[name]
        return np.arange(shape[0])[::-1] if name.endswith(".order") else np.broadcast_to(np.float32(0), shape)

    def levels(self, name: str) -> Levels | None:
        """Return None: nothing is rounded."""
        return None


class FileMatrix:
    """A matrix that lies in a file, float32 where it is looked at.

    The file is mapped anew for each look, so that no more of it counts as this process's memory than what is looked at.
    """

    def __init__(self, file: str, place: _Place, transposed: bool = False) -> None:
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


def _read_tensor(file: str, place: _Place, transposed: bool) -> Stored:
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

    A base model saved without its head has names without the first part ("embed_tokens" for "model.embed_tokens").
    """
    if architecture is None:
        return CheckpointWeights(folder)
    tensors = architecture.tensors
    base, _, bare = f"{tensors.embed}.weight".partition(".")
    headless = bare in open_shards(weight_files(folder))
    prefix = f"{base}." if headless else ""
    return CheckpointWeights(folder, architecture.transposed(), tensors.stored, prefix, tensors.turned)


def check_tensors(architecture: Architecture, source: CheckpointWeights) -> None:
    """Raise DataError unless the checkpoint holds exactly the tensors that the description uses, in their shapes.

    A tensor too many is a part of the model that the graph would leave out.
    """
    needed, allowed = expected_tensors(architecture, source)
    where = str(source.folder)
    if missing := sorted(needed.keys() - source.shapes.keys()):
        raise DataError(
            f"the checkpoint lacks {missing[0]} ({len(missing)} tensors in all)",
            fix="give a complete checkpoint of the architecture that config.json names",
            where=where,
        )
    expected = needed | allowed
    if unknown := sorted(source.shapes.keys() - expected.keys()):
        raise DataError(
            f"the description of {architecture.family} has no place for {unknown[0]} ({len(unknown)} tensors in all)",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families",
            where=where,
        )
    for name, shape in source.shapes.items():
        if shape != expected[name]:
            raise DataError(
                f"{name} is {shape}, config.json makes it {expected[name]}",
                fix="give the config.json that belongs to these weights",
                where=where,
            )


def expected_tensors(architecture: Architecture, source: WeightSource) -> tuple[Shapes, Shapes]:
    """Return (needed, allowed besides): biases are used wherever they are stored."""
    names = architecture.tensors
    table = (architecture.vocab, architecture.hidden)
    needed: Shapes = {f"{names.embed}.weight": table, **architecture.norms(), **architecture.corrections()}
    if names.positions:
        needed[f"{names.positions}.weight"] = (architecture.context + names.position_offset, architecture.hidden)
    allowed: Shapes = {f"{names.head}.weight": table} if architecture.tied else {}
    for name, (m, n) in architecture.linears().items():
        if architecture.tied and name == names.head:
            continue
        parts, biases = _parts(source.form(name), m, n)
        needed |= {f"{name}.{part}": shape for part, shape in parts.items()}
        allowed |= {f"{name}.{part}": (m,) for part in biases}
    return needed, allowed


def _parts(form: StoredForm, m: int, n: int) -> tuple[Shapes, tuple[str, ...]]:
    """Return (tensors that a Linear of m × n always stores, names of those that it may store)."""
    if form.rank:
        needed, largest = (state_of(form.kind, m, n, form.rank, bias) for bias in (False, True))
        return {part: tuple(blank.shape) for part, blank in needed.items()}, tuple(largest.keys() - needed.keys())
    return {"weight": (m, n)}, ("bias",)
