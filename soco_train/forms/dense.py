"""A layer that stays dense and was trained: its weight and bias stand for the model's own.

This is no storage that a plan could choose: it costs what the layer costs as it is, and becomes an nn.Linear again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from soco_train.forms.base import FactoredLinear, LayerFactors, parameter


@dataclass(frozen=True)
class DenseWeight(LayerFactors):
    """y = weight x + bias with weight: [m, n], bias: [m] or None."""

    rounded_as_trained = True
    weight: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the layer."""
        return self.weight.shape[0], self.weight.shape[1]

    @staticmethod
    def cost(rank: Any, m: Any, n: Any) -> Any:
        """Return m n: the rank is always m."""
        return rank * n

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> DenseWeight:
        """Return a layer of these sizes on the meta device; it has one rank, m."""
        with torch.device("meta"):
            return cls(torch.empty(m, n), torch.empty(m) if bias else None)

    @classmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> DenseWeight:
        """Return the product."""
        return cls(up @ down, bias)


class WholeLinear(FactoredLinear):
    """y = weight x: the way of a DenseWeight to the nn.Linear that it becomes in every model."""

    kind = "dense"
    height_part = "weight"
    bias: nn.Parameter | None

    @classmethod
    def from_factors(
        cls, factors: DenseWeight, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> WholeLinear:
        """Build from weight [m, n] and bias [m] or None."""
        m, n = factors.shape
        module = cls(n, m, rank=m, device="meta")
        module.weight = parameter(factors.weight, dtype, device)
        module.bias = None if factors.bias is None else parameter(factors.bias, dtype, device)
        return module

    def dense_weight(self) -> torch.Tensor:
        """Return the weight as it is."""
        return self.weight.detach()

    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias."""
        return self.bias


DenseWeight.module = WholeLinear
