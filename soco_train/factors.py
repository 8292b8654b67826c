"""The cut: factors from the surviving components, and the pruned layer as a module that can be trained.

    W' = P_K diag(s_K) B_K = up · down,   up = P_K diag(√s · β),   down = diag(√s / β) B_K

β splits each component's norm evenly between the two factors, so that both have a similar range (quantisation and half
precision want that). The deviation and the layer's bias become the bias of `up`. Pivoted storage is another way to
write the same rank-r matrices, so it is chosen last, when nothing is trained any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import nn
from torch.nn import functional

from soco_train import parallel
from soco_train.artifacts import LayerFactors, LazyLayers, PivotedFactors, Scores, Spectrum, StackedFactors, forms_of
from soco_train.budget import RankPlan, kept
from soco_train.layers import substituted
from soco_train.pivot import pivot_factors
from soco_train.rounding import rounded, rounds
from soco_train.settings import RoundingSettings, Storage


def make_factors(
    spectra: Mapping[str, Spectrum], scores: Scores, plan: RankPlan, linears: Mapping[str, nn.Linear]
) -> LazyLayers[StackedFactors]:
    """Cut every pruned layer of `plan`: stacked factors, up: [m, r], down: [r, n], bias: [m] or None.

    A layer is cut when it is asked for, so that neither all spectra nor all factors have to be in memory.
    """
    biases = {name: None if linears[name].bias is None else linears[name].bias.detach().cpu() for name in plan.layers}

    def make(name: str) -> StackedFactors:
        return _cut(spectra[name], scores, name, plan.layers[name].rank, biases[name])

    forms = {}
    for name, layer in plan.layers.items():
        if not layer.dense:
            (m, n), r = scores.layers[name].shape, layer.rank
            biased = biases[name] is not None or scores.layers[name].deviation is not None
            forms[name] = StackedFactors(_form(m, r), _form(r, n), _form(m) if biased else None)
    return LazyLayers(forms, make)


def _form(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _cut(spectrum: Spectrum, scores: Scores, name: str, rank: int, bias: torch.Tensor | None) -> StackedFactors:
    layer = scores.layers[name]
    survivors = kept(layer.importance, rank)
    up, down = spectrum.P[:, survivors].double(), spectrum.B[survivors].double()
    if layer.correction is not None:
        left, right = layer.correction
        down = down + left[survivors].double() @ right.double()
    root = layer.scale[survivors].double().clamp(min=0).sqrt()
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
    up, down = up * (root * balance), down * (root / balance)[:, None]
    if layer.deviation is not None:
        bias = layer.deviation if bias is None else layer.deviation + bias
    return StackedFactors(up.float(), down.float(), None if bias is None else bias.float())


def store_as(factors: Mapping[str, StackedFactors], storage: Storage) -> Mapping[str, LayerFactors]:
    """Return stacked factors in the form the plan counted on; lossless. Pivots are chosen when a layer is asked for."""
    if storage == "stacked":
        return factors
    forms = {name: _pivoted_form(form) for name, form in forms_of(factors).items()}
    return LazyLayers(forms, lambda name: pivot_factors(factors[name]))


def _pivoted_form(form: StackedFactors) -> PivotedFactors:
    (m, r), n = form.up.shape, form.down.shape[1]
    bias = None if form.bias is None else _form(m)
    return PivotedFactors(_form(r, n), _form(m - r, r), _form(m, dtype=torch.int64), bias)


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
