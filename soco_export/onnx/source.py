"""What a graph is built from: how each Linear is stored, and tensors by their names in the description."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.write.matrix import Stored
from soco_train.forms.base import FORMS
from soco_train.forms.registry import state_of
from soco_train.numbers.blocks import Levels

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


@dataclass(frozen=True)
class Place:
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
) -> dict[str, Place]:
    """Return what a stored tensor is called here, with its place; a stack of experts has many names.

    turned: matrices of a stack are [inputs, outputs], and outputs of several names come in turn.
    """
    names = [f"{prefix}{name}"]
    for part, instead in renamed:
        names = [one.replace(part, new, 1) for one in names for new in (instead if part in one else (part,))]
    if len(names) == 1 and "{}" not in names[0]:
        return {names[0]: Place(name, ..., shape)}
    count, found = len(names), {}
    rows = shape[-1 if turned else 1] // count
    for expert in range(shape[0]):
        for index, one in enumerate(names):
            if turned:
                place = Place(name, (expert, ..., slice(index, None, count)), (*shape[1:-1], rows), len(shape) > 2)
            else:
                place = Place(name, (expert, slice(index * rows, (index + 1) * rows)), (rows, *shape[2:]))
            found[one.format(expert)] = place
    return found


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
