"""What a storage form is: the numbers of a low-rank layer, what they cost, and the module that computes with them.

A form is two classes: a `LayerFactors`, and the `FactoredLinear` that is registered for it with `@form`. Plan, cut,
files, checkpoints, cost card, timing and graphs ask them; its ONNX nodes are registered in
soco_export/onnx/emit/linear.py. How to write one: docs/extending.md.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from soco_train.forms.costs import COSTS
from soco_train.settings.plan import STORAGE


class LayerFactors(ABC):
    """The numbers of one layer: a frozen dataclass of tensors, with the complete bias [m] or None as `bias`.

    One layer in numbers is an instance; the form itself, its costs and its way from stacked factors, is the class.
    """

    module: ClassVar[type[FactoredLinear]]  # set by `form`
    rounded_as_trained: ClassVar[bool] = False  # whether export rounds the very numbers that distillation trains
    notes: ClassVar[Mapping[str, str]] = {}  # what the report says beside an `export.weights`
    bias: torch.Tensor | None

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(m, n) of the dense layer."""

    @staticmethod
    @abstractmethod
    def cost(rank: Any, m: Any, n: Any) -> Any:
        """Return the parameters of an [m, n] layer at `rank`, without bias, rising in the rank.

        Plain arithmetic: ranks and sizes are numbers, arrays of them, or tensors that want gradients.
        """

    @classmethod
    @abstractmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> LayerFactors:
        """Return a layer of these sizes without its numbers, on the meta device."""

    @classmethod
    @abstractmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> LayerFactors:
        """Return the map up (down x) + bias, up: [m, r], down: [r, n], bias: [m] in this form, as its dtype allows."""

    @staticmethod
    def cut_bytes(rank: float, m: int, n: int) -> float:
        """Return the memory that `of` takes beside what it is given and returns."""
        return 0.0

    def growth(self) -> float | None:
        """Return by how much the rounding of some numbers grows in others; None where nothing is computed of others."""
        return None


class FactoredLinear(nn.Module):
    """A layer of low rank: `weight` [rank, in_features], sizes, and the way back to one dense nn.Linear."""

    kind: ClassVar[str]
    height_part: ClassVar[str]  # the tensor whose first axis has out_features entries
    bias_part: ClassVar[str] = "bias"
    width_part: ClassVar[str] = "weight"  # the tensor whose last axis has in_features entries
    order_part: ClassVar[str | None] = None  # the tensor that says in which order the outputs come, if not in their own
    stands_for: type[nn.Module] = nn.Linear  # the class of the module in whose place it is

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.rank = rank
        self.weight = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))

    @classmethod
    def full_rank(cls, m: int, n: int) -> int:
        """Return the rank from which on an [m, n] layer saves nothing, and a dense one stands in its place."""
        return m

    @classmethod
    @abstractmethod
    def from_factors(cls, factors: Any, dtype: torch.dtype | None, device: torch.device | str | None) -> FactoredLinear:
        """Build from the numbers of this form, in `dtype` on `device` (None: as the numbers are)."""

    @abstractmethod
    def dense_weight(self) -> torch.Tensor:
        """Return the [out_features, in_features] product in float64 (float32 where the factors are half precision)."""

    @abstractmethod
    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias, [out_features], or None."""

    def to_linear(self) -> nn.Linear:
        """Return one dense nn.Linear with the same map, dtype, device and mode."""
        bias = self.dense_bias()
        linear = nn.Linear(self.in_features, self.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(self.dense_weight().to(self.weight.dtype))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear.train(self.training)

    def _product_dtype(self) -> torch.dtype:
        return torch.float64 if self.weight.dtype in (torch.float32, torch.float64) else torch.float32

    def extra_repr(self) -> str:
        """Sizes, as nn.Linear shows them."""
        return f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"


def parameter(tensor: torch.Tensor, dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    """Return a copy of `tensor` as a parameter, in `dtype` on `device` (None: as it is)."""
    return nn.Parameter(tensor.detach().to(device=device, dtype=dtype, copy=True).contiguous())


_Module = TypeVar("_Module", bound=FactoredLinear)
FORMS: dict[str, type[LayerFactors]] = {}


def form(numbers: type[LayerFactors], planned: bool = True) -> Callable[[type[_Module]], type[_Module]]:
    """Register the decorated module, and with it the form, under its `kind`: the name that `storage` uses.

    planned: whether a plan may choose it; else only a refinement makes such layers.
    """

    def register(module: type[_Module]) -> type[_Module]:
        numbers.module = module
        FORMS[module.kind] = numbers
        if planned:
            STORAGE.add(module.kind)
            COSTS[module.kind] = numbers.cost
        return module

    return register
