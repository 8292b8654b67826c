"""A pruned layer as a module that can be trained: its two factors, perhaps as rounding leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Generic, TypeVar, cast

import torch
from torch import nn
from torch.nn import functional

from soco_train import parallel
from soco_train.forms.dense import DenseWeight
from soco_train.forms.heads import HeadColumns, HeadRows, fill_rows
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import substituted
from soco_train.numbers.rounding import of_layer, rounded, rounds, trains_dense
from soco_train.settings.rounding import RoundingSettings


class FactorPair(nn.Module):
    """The factors of one layer as what is trained: y = up (down x) + bias, both perhaps as rounding leaves them."""

    def __init__(self, factors: StackedFactors, device: torch.device, rounding: RoundingSettings | None = None) -> None:
        super().__init__()
        self.rounding = rounding
        self.up = nn.Parameter(factors.up.clone().to(device))
        self.down = nn.Parameter(factors.down.clone().to(device))
        self.bias = None if factors.bias is None else nn.Parameter(factors.bias.clone().to(device))
        self.rank: int | None = None  # how many components take part, the first; None: all

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        down, up = self.down[: self.rank], self.up[:, : self.rank]
        z = functional.linear(x, _seen(down, self.rounding, x))
        return functional.linear(z, _seen(up, self.rounding, x), _bias(self.bias, x))

    @torch.no_grad()
    def load(self, factors: StackedFactors) -> None:
        """Take other factors of the same shapes."""
        self.up.copy_(factors.up)
        self.down.copy_(factors.down)
        if self.bias is not None and factors.bias is not None:
            self.bias.copy_(factors.bias)

    def rounded_parts(self) -> tuple[torch.Tensor, ...]:
        """Return the matrices that `rounding` is for, as they are before it."""
        return () if self.rounding is None else (self.up, self.down)

    def numbers(self) -> StackedFactors:
        """Return the factors as they are now, whole."""
        return StackedFactors(_taken(self.up), _taken(self.down), None if self.bias is None else _taken(self.bias))


class WholeWeight(nn.Module):
    """The weight of a layer that stays dense as what is trained, in fp32: y = weight x + bias, the weight rounded."""

    def __init__(self, dense: nn.Linear, rounding: RoundingSettings) -> None:
        super().__init__()
        self.rounding = rounding
        self.weight = nn.Parameter(dense.weight.detach().to(torch.float32, copy=True))
        self.bias = None if dense.bias is None else nn.Parameter(dense.bias.detach().to(torch.float32, copy=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        return functional.linear(x, _seen(self.weight, self.rounding, x), _bias(self.bias, x))

    def rounded_parts(self) -> tuple[torch.Tensor, ...]:
        """Return the matrices that `rounding` is for, as they are before it."""
        return (self.weight,)

    def numbers(self) -> DenseWeight:
        """Return weight and bias as they are now, whole."""
        return DenseWeight(_taken(self.weight), None if self.bias is None else _taken(self.bias))


class HeadWeight(nn.Module):
    """A projection of values of fewer numbers a head as what is trained; which numbers stay is not."""

    order: torch.Tensor

    def __init__(
        self, factors: HeadRows | HeadColumns, device: torch.device, rounding: RoundingSettings | None = None
    ) -> None:
        super().__init__()
        self.rounding = rounding
        self.form = type(factors)
        self.weight = nn.Parameter(factors.weight.clone().to(device))
        self.bias = None if factors.bias is None else nn.Parameter(factors.bias.clone().to(device))
        self.register_buffer("order", factors.order.to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        weight, bias = _seen(self.weight, self.rounding, x), _bias(self.bias, x)
        if self.form is HeadColumns:
            return functional.linear(x.index_select(-1, self.order[: weight.shape[1]]), weight, bias)
        y = fill_rows(functional.linear(x, weight), self.order)
        return y if bias is None else y + bias

    def rounded_parts(self) -> tuple[torch.Tensor, ...]:
        """Return the matrices that `rounding` is for, as they are before it."""
        return () if self.rounding is None else (self.weight,)

    def numbers(self) -> HeadRows | HeadColumns:
        """Return weight and bias as they are now, whole."""
        bias = None if self.bias is None else _taken(self.bias)
        return self.form(_taken(self.weight), self.order.cpu(), bias)


def _seen(matrix: torch.Tensor, rounding: RoundingSettings | None, x: torch.Tensor) -> torch.Tensor:
    return (matrix if rounding is None else rounded(matrix, rounding)).to(x.dtype)


def _bias(bias: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if bias is None else bias.to(x.dtype)


def _taken(parameter: nn.Parameter) -> torch.Tensor:
    return parallel.whole(parameter.detach()).cpu().clone()


Learnt = TypeVar("Learnt", bound=FactorPair | WholeWeight | HeadWeight, covariant=True)


class TrainedLinear(nn.Module, Generic[Learnt]):
    """What is trained of a layer, or the dense layer in teacher mode.

    What is trained is a module of its own so that sharding it (parallel.py) leaves the dense layer, and its passes,
    alone.
    """

    def __init__(self, dense: nn.Linear, learnt: Learnt) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.learnt = learnt
        self.teaching = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        y: torch.Tensor = self.dense(x) if self.teaching else self.learnt(x)
        return y


FactorLinear = TrainedLinear[FactorPair]


class RoundedLinear(nn.Module):
    """A layer that stays dense and is not trained, as rounding will leave it, or as it is in teacher mode."""

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
    """Put the factors in the place of the pruned Linears for the duration of the context, all else frozen."""
    pruned = {name: linears[name] for name in factors}
    return substituted(model, pruned, lambda name, linear: _factor_linear(linear, factors[name]))


def _factor_linear(dense: nn.Linear, factors: StackedFactors, rounding: RoundingSettings | None = None) -> FactorLinear:
    return TrainedLinear(dense, FactorPair(factors, dense.weight.device, rounding))


Learning = TrainedLinear[FactorPair | WholeWeight | HeadWeight]
Deployed = Learning | RoundedLinear


def deployed(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, StackedFactors | HeadRows | HeadColumns],
    rounding: RoundingSettings,
) -> AbstractContextManager[dict[str, Deployed]]:
    """As `factored`; those `linears` that will be rounded and have no factors are there as rounding leaves them.

    Projections of values are among the factors and not among the `linears`.
    """

    def make(name: str, linear: nn.Linear) -> Deployed:
        own = of_layer(rounding, name)
        if name in factors:
            layer, seen = factors[name], own if rounds(rounding, name) else None
            if isinstance(layer, StackedFactors):
                return _factor_linear(linear, layer, seen)
            return TrainedLinear(linear, HeadWeight(layer, linear.weight.device, seen))
        if trains_dense(rounding, name):
            return TrainedLinear(linear, WholeWeight(linear, own))
        return RoundedLinear(linear, own)

    taking_part = {name: linear for name, linear in linears.items() if name in factors or rounds(rounding, name)}
    taking_part |= {name: cast(nn.Linear, model.get_submodule(name)) for name in factors if name not in linears}
    return substituted(model, taking_part, make)
