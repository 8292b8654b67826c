"""A pruned layer as a module that can be trained: its two factors, perhaps as rounding leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional

from soco_train import parallel
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import substituted
from soco_train.numbers.rounding import rounded, rounds
from soco_train.settings import RoundingSettings


class FactorPair(nn.Module):
    """The factors of one layer as what is trained: y = up (down x) + bias, both perhaps as rounding leaves them."""

    def __init__(self, factors: StackedFactors, device: torch.device, rounding: RoundingSettings | None = None) -> None:
        super().__init__()
        self.rounding = rounding
        self.up = nn.Parameter(factors.up.clone().to(device))
        self.down = nn.Parameter(factors.down.clone().to(device))
        self.bias = None if factors.bias is None else nn.Parameter(factors.bias.clone().to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        z = functional.linear(x, self._seen(self.down, x))
        return functional.linear(z, self._seen(self.up, x), None if self.bias is None else self.bias.to(x.dtype))

    def _seen(self, factor: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return (factor if self.rounding is None else rounded(factor, self.rounding)).to(x.dtype)


class FactorLinear(nn.Module):
    """A pruned layer: its pair of factors, or the dense layer in teacher mode.

    The pair is a module of its own so that sharding it (parallel.py) leaves the dense layer, and its passes, alone.
    """

    def __init__(self, dense: nn.Linear, factors: StackedFactors, rounding: RoundingSettings | None = None) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.pair = FactorPair(factors, dense.weight.device, rounding)
        self.teaching = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        y: torch.Tensor = self.dense(x) if self.teaching else self.pair(x)
        return y

    @torch.no_grad()
    def load(self, factors: StackedFactors) -> None:
        """Take other factors of the same shapes."""
        self.pair.up.copy_(factors.up)
        self.pair.down.copy_(factors.down)
        if self.pair.bias is not None and factors.bias is not None:
            self.pair.bias.copy_(factors.bias)

    def factors(self) -> StackedFactors:
        """Return the factors as they are now, whole."""
        bias = None if self.pair.bias is None else _taken(self.pair.bias)
        return StackedFactors(_taken(self.pair.up), _taken(self.pair.down), bias)


def _taken(parameter: nn.Parameter) -> torch.Tensor:
    return parallel.whole(parameter.detach()).cpu().clone()


class RoundedLinear(nn.Module):
    """A layer that stays dense, as rounding will leave it, or as it is in teacher mode; it is not trained."""

    def __init__(self, dense: nn.Linear, rounding: RoundingSettings) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.rounded = rounded(dense.weight, rounding).to(dense.weight.dtype)
        self.teaching = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        return functional.linear(x, self.dense.weight if self.teaching else self.rounded, self.dense.bias)


def factored(
    model: nn.Module, linears: Mapping[str, nn.Linear], factors: Mapping[str, StackedFactors]
) -> AbstractContextManager[dict[str, FactorLinear]]:
    """Put FactorLinears in the place of the pruned Linears for the duration of the context, all else frozen."""
    pruned = {name: linears[name] for name in factors}
    return substituted(model, pruned, lambda name, linear: FactorLinear(linear, factors[name]))


def deployed(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, StackedFactors],
    rounding: RoundingSettings,
) -> AbstractContextManager[dict[str, FactorLinear | RoundedLinear]]:
    """As `factored`, and those `linears` that are rounded and have no factors become RoundedLinears."""

    def make(name: str, linear: nn.Linear) -> FactorLinear | RoundedLinear:
        if name not in factors:
            return RoundedLinear(linear, rounding)
        return FactorLinear(linear, factors[name], rounding if rounds(rounding, name) else None)

    taking_part = {name: linear for name, linear in linears.items() if name in factors or rounds(rounding, name)}
    return substituted(model, taking_part, make)
