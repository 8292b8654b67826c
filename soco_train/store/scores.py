"""Scores of singular components, of all layers in one file, for every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from soco_train.bounded import MADE_ANEW, answering
from soco_train.errors import DataError
from soco_train.store.spectra import Spectrum
from soco_train.store.tensorfile import Provenance, checked, layer_shape, read_tensors, write_tensors

_Pair = tuple[torch.Tensor, torch.Tensor]
_PAIRS = (("correction", "C", "A"), ("adapter", "C", "A"), ("components", "P", "B"))  # and what their halves are called


@dataclass(frozen=True)
class LayerScores:
    """What training learnt about one layer's components.

    importance: [k] fp32, larger lives longer; scale: [k] fp32, multiplies the component; deviation: [m] or None,
    added to the layer's output; shape: (m, n) of the dense weight; correction: (C [k, r], A [r, n]) or None, where C A
    is added to the component's B, of whatever size the cut is; adapter: (C [m, r], A [r, n]) or None, where C A is
    added to the layer beside its components and takes r of the ranks that the plan gives it; components: (P [m, k],
    B [k, n]) or None, what the spectrum's became where they learnt beside their scores.
    """

    importance: torch.Tensor
    scale: torch.Tensor
    deviation: torch.Tensor | None
    shape: tuple[int, int]
    correction: _Pair | None = None
    adapter: _Pair | None = None
    components: _Pair | None = None

    def components_of(self, spectrum: Spectrum, chosen: torch.Tensor) -> _Pair:
        """Return the components `chosen` [r] (indices): P [m, r], B [r, n] in float64, without their scales."""
        P, B = self.components or (spectrum.P, spectrum.B)
        P, B = P[:, chosen].double(), B[chosen].double()
        if self.correction is not None:
            left, right = self.correction
            B = B + left[chosen].double() @ right.double()
        return P, B


@dataclass(frozen=True)
class Scores:
    """Scores of all participating layers; one file serves every size."""

    layers: Mapping[str, LayerScores]
    provenance: Provenance = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many parameters the whole dense model has; DataError where that was not written."""
        found = self.provenance.get("parameters")
        if type(found) is not int or found < 1:
            raise DataError(
                f"the scores say that their model has {str(found)[:60]} parameters", fix=MADE_ANEW, where="provenance"
            )
        return found

    def save(self, path: Path) -> None:
        """Write `scores.safetensors`; DataError, naming the layer, if a number is NaN or infinite."""
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}:importance"] = layer.importance
            tensors[f"{name}:scale"] = layer.scale
            if layer.deviation is not None:
                tensors[f"{name}:deviation"] = layer.deviation
            for part, first, second in _PAIRS:
                if (pair := getattr(layer, part)) is not None:
                    tensors[f"{name}:{part}.{first}"], tensors[f"{name}:{part}.{second}"] = pair
        shapes = {name: list(layer.shape) for name, layer in self.layers.items()}
        checks = {name: checked(name.replace(":", " "), tensor) for name, tensor in tensors.items()}
        write_tensors(path, checks, {"kind": "scores", "shapes": shapes, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path) -> Scores:
        """Read `scores.safetensors`; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "scores")

        def make() -> Scores:
            layers = {name: _layer(name, shape, tensors) for name, shape in header["shapes"].items()}
            if not layers:
                raise ValueError("there is no layer in them")
            return Scores(layers, dict(header["provenance"]))

        return answering("these are no scores", str(path), MADE_ANEW, make)


def _layer(name: str, shape: list[int], tensors: Mapping[str, torch.Tensor]) -> LayerScores:
    """Return one layer's scores; ValueError if a tensor is not of the layer's shape, or not finite."""
    m, n = layer_shape(name, shape)
    layer = LayerScores(
        importance=tensors[f"{name}:importance"],
        scale=tensors[f"{name}:scale"],
        deviation=tensors.get(f"{name}:deviation"),
        shape=(m, n),
        **{part: _pair(f"{name}:{part}", first, second, tensors) for part, first, second in _PAIRS},
    )
    components = (min(m, n),)
    left, right = layer.correction or (torch.empty(*components, 0), torch.empty(0, n))
    outer, inner = layer.adapter or (torch.empty(m, 0), torch.empty(0, n))
    P, B = layer.components or (None, None)
    parts = {
        "importance": (layer.importance, components),
        "scale": (layer.scale, components),
        "deviation": (layer.deviation, (m,)),
        "correction.C": (left, (*components, left.shape[-1])),
        "correction.A": (right, (left.shape[-1], n)),
        "adapter.C": (outer, (m, outer.shape[-1])),
        "adapter.A": (inner, (outer.shape[-1], n)),
        "components.P": (P, (m, *components)),
        "components.B": (B, (*components, n)),
    }
    for part, (tensor, expected) in parts.items():
        if tensor is not None and (tuple(tensor.shape) != expected or not bool(tensor.isfinite().all())):
            raise ValueError(f"{part} of {name} is not {list(expected)} finite numbers")
    return layer


def _pair(name: str, first: str, second: str, tensors: Mapping[str, torch.Tensor]) -> _Pair | None:
    left = tensors.get(f"{name}.{first}")
    return None if left is None else (left, tensors[f"{name}.{second}"])
