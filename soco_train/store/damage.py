"""What each layer loses at each rank and in each type, in one unit for all layers; the price list of a byte plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from soco_train.bounded import MADE_ANEW, answering
from soco_train.forms.base import FORMS
from soco_train.settings.rounding import TYPES, WeightType
from soco_train.store.arrays import layer_shape
from soco_train.store.tensorfile import read_tensors, write_tensors

DENSE = "dense"
StorageKind = tuple[str, WeightType, int]  # form, type of weights, inputs of a block (0: floats have none)


def types_of(form: str) -> tuple[WeightType, ...]:
    """Return the types that a layer of this form is measured in.

    Where outputs are computed of others, rounding grows in them, and below int8 nothing pays.
    """
    return TYPES if form == DENSE or FORMS[form].rounded_as_trained else TYPES[:2]


@dataclass(frozen=True)
class LayerDamage:
    """Errors of one layer [m, n] by form, type of weights (`same`: not rounded) and block.

    curves: kind → [k + 1] float64, entry r at rank r; a dense layer has the one entry [1]. biased: whether a
    pruned layer gets a bias that the dense one has not.
    """

    shape: tuple[int, int]
    curves: Mapping[StorageKind, torch.Tensor]
    biased: bool = False

    def only(self, weights: WeightType | None, block: int | None = None) -> LayerDamage:
        """Return the errors in one type and block; None: in all."""
        curves = {
            kind: curve
            for kind, curve in self.curves.items()
            if weights in (None, kind[1]) and (block is None or kind[2] in (0, block))
        }
        return replace(self, curves=curves)

    def alone(self, form: str, weights: WeightType, block: int) -> LayerDamage:
        """Return the errors of one kind: this one, or of the same form the next to it."""
        kinds = [kind for kind in self.curves if kind[0] == form]
        found = min(kinds, key=lambda kind: (kind[1] != weights, abs(kind[2] - block)))
        return replace(self, curves={found: self.curves[found]})


@dataclass(frozen=True)
class Damage:
    """The damage to every layer, token table and head; `provenance`: what it was measured with."""

    layers: Mapping[str, LayerDamage]
    provenance: Mapping[str, object] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write `damage.safetensors`."""
        tensors = {
            f"{name}:{form}:{weights}:{block}": curve
            for name, layer in self.layers.items()
            for (form, weights, block), curve in layer.curves.items()
        }
        shapes = {name: [*layer.shape, layer.biased] for name, layer in self.layers.items()}
        write_tensors(path, tensors, {"kind": "damage", "shapes": shapes, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path) -> Damage:
        """Read `damage.safetensors`; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "damage")

        def make() -> Damage:
            curves: dict[str, dict[StorageKind, torch.Tensor]] = {name: {} for name in header["shapes"]}
            for key, curve in tensors.items():
                name, form, weights, block = key.rsplit(":", 3)
                if curve.ndim != 1 or weights not in TYPES or not bool(curve.isfinite().all()):
                    raise ValueError(f"{key} is no list of finite numbers for a type of weights")
                curves[name][form, weights, int(block)] = curve
            shapes = header["shapes"].items()
            layers = {
                name: LayerDamage(layer_shape(name, sizes), curves[name], bool(biased))
                for name, (*sizes, biased) in shapes
            }
            return Damage(layers, dict(header["provenance"]))

        return answering("this is no damage of layers", str(path), MADE_ANEW, make)


def no_damage(shapes: Mapping[str, tuple[int, int]], kinds: Mapping[str, Sequence[StorageKind]]) -> Damage:
    """Return damage of 0 for layers of these shapes in each of their `kinds`: only bytes count then."""
    return Damage(
        {
            name: LayerDamage(shape, {kind: torch.zeros(min(shape) + 1, dtype=torch.float64) for kind in kinds[name]})
            for name, shape in shapes.items()
        }
    )
