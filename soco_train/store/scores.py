"""Scores of singular components, of all layers in one file, for every size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from soco_train.store.arrays import Provenance
from soco_train.store.importances import PAIRS, Importances, LayerImportance, checked_layers
from soco_train.store.spectra import Spectrum
from soco_train.store.tensorfile import checked, read_tensors, write_tensors

_Pair = tuple[torch.Tensor, torch.Tensor]


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

    def importances(self) -> Importances:
        """Return what a plan reads of them."""
        layers = {
            name: LayerImportance(
                layer.importance.detach().cpu().double().numpy(), layer.shape, layer.deviation is not None
            )
            for name, layer in self.layers.items()
        }
        return Importances(layers, self.provenance)

    def save(self, path: Path) -> None:
        """Write `scores.safetensors`; DataError, naming the layer, if a number is NaN or infinite."""
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}:importance"] = layer.importance
            tensors[f"{name}:scale"] = layer.scale
            if layer.deviation is not None:
                tensors[f"{name}:deviation"] = layer.deviation
            for part, first, second in PAIRS:
                if (pair := getattr(layer, part)) is not None:
                    tensors[f"{name}:{part}.{first}"], tensors[f"{name}:{part}.{second}"] = pair
        shapes = {name: list(layer.shape) for name, layer in self.layers.items()}
        checks = {name: checked(name.replace(":", " "), tensor) for name, tensor in tensors.items()}
        write_tensors(path, checks, {"kind": "scores", "shapes": shapes, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path) -> Scores:
        """Read `scores.safetensors`; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "scores")
        stored, provenance = checked_layers(path, tensors, header, lambda tensor: bool(tensor.isfinite().all()))
        return Scores({name: _layer(*found) for name, found in stored.items()}, provenance)


def _layer(shape: tuple[int, int], parts: Mapping[str, torch.Tensor]) -> LayerScores:
    pairs = {
        pair: (parts[f"{pair}.{first}"], parts[f"{pair}.{second}"])
        for pair, first, second in PAIRS
        if f"{pair}.{first}" in parts
    }
    return LayerScores(parts["importance"], parts["scale"], parts.get("deviation"), shape, **pairs)
