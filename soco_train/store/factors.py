"""The factors of one size on disk: one safetensors file, read and written a layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from soco_train.bounded import MADE_ANEW, answering
from soco_train.forms.base import LayerFactors
from soco_train.forms.registry import form_of_class, forms_of, from_factors
from soco_train.store.arrays import Provenance
from soco_train.store.tensorfile import Pending, checked, read_tensors, write_tensors


@dataclass(frozen=True)
class Factors:
    """The layers of one size, pruned or dense and trained. A participating layer that is not here stays as it was."""

    layers: Mapping[str, LayerFactors]
    provenance: Provenance = field(default_factory=dict)

    def made(self) -> Factors:
        """Return the same factors with every layer in memory."""
        return Factors(dict(self.layers), self.provenance)

    def save(self, path: Path) -> None:
        """Write `factors.safetensors`; what is lazy is made a layer at a time. DataError for NaN, naming the layer."""
        forms = forms_of(self.layers)

        @lru_cache(maxsize=1)  # the parts of a layer are written one after the other
        def parts_of(name: str) -> Mapping[str, torch.Tensor]:
            return vars(self.layers[name])

        tensors = {
            f"{name}:{part}": checked(f"{part} of {name}", Pending(meta, partial(_part, parts_of, name, part)))
            for name, form in forms.items()
            for part, meta in vars(form).items()
            if meta is not None
        }
        kinds = {name: type(form).__name__ for name, form in forms.items()}
        write_tensors(path, tensors, {"kind": "factors", "layers": kinds, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path, only: str | None = None) -> Factors:
        """Read `factors.safetensors`, or one layer of it; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "factors", "" if only is None else f"{only}:")

        def make() -> Factors:
            kinds = header["layers"] if only is None else {only: header["layers"][only]}
            layers = {name: _layer_factors(kind, name, tensors) for name, kind in kinds.items()}
            return Factors(layers, dict(header["provenance"]))

        return answering("these are no factors", str(path), MADE_ANEW, make)


def _part(parts_of: Callable[[str], Mapping[str, torch.Tensor]], name: str, part: str) -> torch.Tensor:
    return parts_of(name)[part]


def _layer_factors(kind: str, name: str, tensors: Mapping[str, torch.Tensor]) -> LayerFactors:
    numbers = form_of_class(kind)
    parts: dict[str, Any] = {
        part.name: tensors.get(f"{name}:bias") if part.name == "bias" else tensors[f"{name}:{part.name}"]
        for part in fields(numbers)  # type: ignore[arg-type]
    }
    layer = numbers(**parts)
    rank = from_factors(forms_of({name: layer})[name], device="meta").rank
    blank = numbers.blank(*layer.shape, rank, layer.bias is not None)
    if any(tensor is not None and tensor.shape != vars(blank)[part].shape for part, tensor in parts.items()):
        raise ValueError(f"the tensors of {name} do not fit together")
    return layer
