"""The stored forms by name, and layers in either of them.

Every form keeps its first factor in a parameter called `weight`, under the name that the dense weight had, with r rows
where that had m. A program that does not know these modules therefore fails on the shape when it loads such a
checkpoint, instead of running on with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch

from soco_train.forms.base import FactoredLinear
from soco_train.forms.pivoted import PivotedFactors, PivotedLinear
from soco_train.forms.stacked import LowRankLinear, StackedFactors

LayerFactors = StackedFactors | PivotedFactors
Layer = TypeVar("Layer", bound=LayerFactors)


class LazyLayers(Mapping[str, Layer]):
    """Layers that are made anew each time they are asked for, so that one at a time is in memory.

    forms: the same layers on the meta device, which says how large each will be.
    """

    def __init__(self, forms: Mapping[str, Layer], make: Callable[[str], Layer]) -> None:
        self.forms = forms
        self._make = make

    def __getitem__(self, name: str) -> Layer:
        if name not in self.forms:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)


def forms_of(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """Return layers without their numbers, on the meta device; what is lazy is not made for that."""
    return layers.forms if isinstance(layers, LazyLayers) else {name: _form(layer) for name, layer in layers.items()}


def _form(layer: Layer) -> Layer:
    parts: dict[str, Any] = {
        part: tensor if tensor is None else tensor.to("meta") for part, tensor in vars(layer).items()
    }
    return type(layer)(**parts)


FACTORED: dict[str, type[LowRankLinear] | type[PivotedLinear]] = {
    LowRankLinear.kind: LowRankLinear,
    PivotedLinear.kind: PivotedLinear,
}


def from_factors(
    factors: LayerFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FactoredLinear:
    """Return the module that carries `factors`, in `dtype` on `device` (None: as the factors are)."""
    if isinstance(factors, StackedFactors):
        return LowRankLinear.from_factors(factors, dtype, device)
    return PivotedLinear.from_factors(factors, dtype, device)
