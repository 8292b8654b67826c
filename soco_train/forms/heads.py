"""Value heads of fewer numbers: the projection that makes what attention caches, and the one that reads its mixtures.

    HeadRows      x ──weight [g·r, n]── the first r of the d numbers of each of g heads, zeros behind ──(+ bias)── v
    HeadColumns   a ── the first r numbers of each of h heads ──weight [m, h·r]──(+ bias)── y

Attention mixes values number by number, so what stands behind the first r reaches nobody. Both hold the outer shapes of
the layers they stand for: no config has to say how large a value head is, and a graph may leave the zeros out.
refine/values.py makes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from soco_train.forms.base import FactoredLinear, LayerFactors, form, parameter


@dataclass(frozen=True)
class _HeadFactors(LayerFactors):
    """A weight, the order of the numbers that it makes or reads (int64, those that stay first), and a bias [m] or None.

    It is no product of factors, and no plan can choose it.
    """

    rounded_as_trained = True
    weight: torch.Tensor
    order: torch.Tensor
    bias: torch.Tensor | None

    @classmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> LayerFactors:
        """Raise TypeError: parts of heads hold no product of factors."""
        raise TypeError("parts of heads hold no product of factors")


class HeadRows(_HeadFactors):
    """y[order[:r]] = weight x, all else of y 0, then + bias; weight: [r, n], order: [m]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the dense layer."""
        return self.order.shape[0], self.weight.shape[1]

    @staticmethod
    def cost(rank: Any, m: Any, n: Any) -> Any:
        """Return r n."""
        return rank * n

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> HeadRows:
        """Return a layer of these sizes on the meta device."""
        with torch.device("meta"):
            order = torch.empty(m, dtype=torch.int64)
            return cls(torch.empty(rank, n), order, torch.empty(m) if bias else None)


class HeadColumns(_HeadFactors):
    """y = weight x[order[:r]] + bias; weight: [m, r], order: [n]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the dense layer."""
        return self.weight.shape[0], self.order.shape[0]

    @staticmethod
    def cost(rank: Any, m: Any, n: Any) -> Any:
        """Return r m."""
        return rank * m

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> HeadColumns:
        """Return a layer of these sizes on the meta device."""
        with torch.device("meta"):
            order = torch.empty(n, dtype=torch.int64)
            return cls(torch.empty(m, rank), order, torch.empty(m) if bias else None)


def first_of_heads(heads: int, size: int, width: int) -> torch.Tensor:
    """Return the order of heads · size numbers in which the first `width` of every head come first, int64."""
    places = torch.arange(heads * size).reshape(heads, size)
    return torch.cat([places[:, :width].flatten(), places[:, width:].flatten()])


def fill_rows(kept: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """Return [..., m] with the numbers `kept` [..., r] at order[:r], and zeros elsewhere."""
    whole = kept.new_zeros(*kept.shape[:-1], len(order))
    return whole.index_copy(-1, order[: kept.shape[-1]], kept)


class _HeadLinear(FactoredLinear):
    """What both share: a weight, the order of numbers, a bias; `_cut`: the axis of the weight that is shorter."""

    _cut: ClassVar[int]
    bias: nn.Parameter | None
    order: torch.Tensor

    @classmethod
    def from_factors(
        cls,
        factors: HeadRows | HeadColumns,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> FactoredLinear:
        """Build from weight, order and bias [m] or None."""
        m, n = factors.shape
        module = cls(n, m, factors.weight.shape[cls._cut], device="meta")
        module.weight = parameter(factors.weight, dtype, device)
        module.register_buffer("order", factors.order.detach().to(device=device, dtype=torch.int64, copy=True))
        module.bias = None if factors.bias is None else parameter(factors.bias, dtype, device)
        return module

    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias."""
        return self.bias


@form(HeadRows, planned=False)
class HeadRowsLinear(_HeadLinear):
    """y = weight x where `order` says, zeros elsewhere (+ bias); its rank are the rows."""

    _cut = 0
    kind = "head-rows"
    height_part = "order"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        y = fill_rows(F.linear(x, self.weight), self.order)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> torch.Tensor:
        """Return the weight with rows of zeros."""
        return fill_rows(self.weight.detach().to(self._product_dtype()).T, self.order).T.contiguous()


@form(HeadColumns, planned=False)
class HeadColumnsLinear(_HeadLinear):
    """y = weight x of those x that `order` says (+ bias); its rank are the columns."""

    _cut = 1
    kind = "head-columns"
    height_part = "weight"
    width_part = "order"

    @classmethod
    def full_rank(cls, m: int, n: int) -> int:
        """Return n."""
        return n

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return F.linear(x.index_select(-1, self.order[: self.rank]), self.weight, self.bias)

    def dense_weight(self) -> torch.Tensor:
        """Return the weight with columns of zeros."""
        return fill_rows(self.weight.detach().to(self._product_dtype()), self.order)
