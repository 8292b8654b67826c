"""Stacked storage: a rank-r matrix as the product of two factors, r(m + n) numbers.

    LowRankLinear   x ──weight [r,n]── z ──up [m,r]──(+ bias)── y

A rank of m n / (m + n) or more saves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from soco_train.forms.base import FactoredLinear, LayerFactors, form, parameter
from soco_train.forms.costs import stacked_cost


@dataclass(frozen=True)
class StackedFactors(LayerFactors):
    """y = up (down x) + bias with up: [m, r], down: [r, n], bias: [m] or None."""

    rounded_as_trained = True
    cost = staticmethod(stacked_cost)
    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the dense layer."""
        return self.up.shape[0], self.down.shape[1]

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> StackedFactors:
        """Return a layer of these sizes on the meta device."""
        with torch.device("meta"):
            return cls(torch.empty(m, rank), torch.empty(rank, n), torch.empty(m) if bias else None)

    @classmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> StackedFactors:
        """Return the tensors as they are: this is how they are trained."""
        return cls(up, down, bias)


@form(StackedFactors)
class LowRankLinear(FactoredLinear):
    """y = up(weight x): two MatMuls, r(m + n) numbers. The bias, if there is one, belongs to `up`."""

    kind = "stacked"
    height_part = "up.weight"
    bias_part = "up.bias"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.up = nn.Linear(rank, out_features, bias, device=device, dtype=dtype)

    @classmethod
    def from_factors(
        cls, factors: StackedFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> LowRankLinear:
        """Build from up [m, r], down [r, n] and the complete bias [m] or None."""
        (rank, n), m = factors.down.shape, factors.up.shape[0]
        module = cls(n, m, rank, factors.bias is not None, device="meta")
        module.weight = parameter(factors.down, dtype, device)
        module.up.weight = parameter(factors.up, dtype, device)
        if factors.bias is not None:
            module.up.bias = parameter(factors.bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        return self.up(F.linear(x, self.weight))

    def dense_weight(self) -> torch.Tensor:
        """Return up @ weight."""
        exact = self._product_dtype()
        return self.up.weight.detach().to(exact) @ self.weight.detach().to(exact)

    def dense_bias(self) -> torch.Tensor | None:
        """Return the bias of `up`."""
        return self.up.bias


def balance(up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Return the factors [r] by which columns of `up` grow and rows of `down` shrink until both are as long."""
    return (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
