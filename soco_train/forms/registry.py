"""The storage forms by name, and layers in any of them.

Every form keeps its first factor in a parameter called `weight`, under the name that the dense weight had, with r rows
where that had m. A program that does not know these modules therefore fails on the shape when it loads such a
checkpoint, instead of running on with random weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, TypeVar

import torch

# imported to be registered
from soco_train.forms import heads, pivoted, stacked
from soco_train.forms.base import FORMS, FactoredLinear, LayerFactors
from soco_train.forms.dense import DenseWeight
from soco_train.settings.plan import STORAGE, check_storage

__all__ = ["heads", "pivoted", "stacked"]

_Layer = TypeVar("_Layer", bound=LayerFactors)


class LazyLayers(Mapping[str, _Layer]):
    """Layers that are made anew each time they are asked for, so that one at a time is in memory.

    forms: the same layers on the meta device, which says how large each will be.
    """

    def __init__(self, forms: Mapping[str, _Layer], make: Callable[[str], _Layer]) -> None:
        self.forms = forms
        self._make = make

    def __getitem__(self, name: str) -> _Layer:
        if name not in self.forms:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)


def forms_of(layers: Mapping[str, _Layer]) -> Mapping[str, _Layer]:
    """Return layers without their numbers, on the meta device, without making those that are lazy."""
    return layers.forms if isinstance(layers, LazyLayers) else {name: _form(layer) for name, layer in layers.items()}


def _form(layer: _Layer) -> _Layer:
    parts: dict[str, Any] = {
        part: tensor if tensor is None else tensor.to("meta") for part, tensor in vars(layer).items()
    }
    return type(layer)(**parts)


def planned_forms() -> dict[str, type[LayerFactors]]:
    """Return the forms that a plan may choose, by the name that `storage` uses."""
    return {name: numbers for name, numbers in FORMS.items() if name in STORAGE}


def find_form(name: str) -> type[LayerFactors]:
    """Return the form that `storage` calls `name`; RecipeError for an unknown one."""
    return FORMS[check_storage(name)]


def form_of_class(name: str) -> type[LayerFactors]:
    """Return the form whose numbers are of the class `name`, as files have it; ValueError if there is none."""
    known: tuple[type[LayerFactors], ...] = (*FORMS.values(), DenseWeight)
    for numbers in known:
        if numbers.__name__ == name:
            return numbers
    raise ValueError(f"{name!r} is no form of factors")


def state_of(kind: str, m: int, n: int, rank: int, bias: bool) -> dict[str, torch.Tensor]:
    """Return the tensors of a stored layer by name, on the meta device: what a checkpoint has to hold of it."""
    return from_factors(FORMS[kind].blank(m, n, rank, bias), device="meta").state_dict()


@lru_cache(maxsize=4096)  # a mixture has tens of thousands of layers, of a few shapes
def rank_at(form: type[LayerFactors], share: float, m: int, n: int) -> float:
    """Return the rank, not rounded, at which an [m, n] layer costs `share` of m n in this form."""
    low, high = 0.0, float(min(m, n))
    for _ in range(60):  # more halvings than a float64 has bits
        middle = (low + high) / 2
        low, high = (middle, high) if form.cost(middle, m, n) < share * m * n else (low, middle)
    return high


def from_factors(
    factors: LayerFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> FactoredLinear:
    """Return the module that carries `factors`, in `dtype` on `device` (None: as the factors are)."""
    return type(factors).module.from_factors(factors, dtype, device)
