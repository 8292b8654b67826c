"""ScoredLinear: a Linear written as its singular components, each with a score; ScoreBank: the scores of all layers.

    y = P (s ⊙ (B x)) + d + bias          W = P B, so the layer is the dense one when s ≡ 1 and d ≡ 0

P and B are frozen. Only z = B x is kept for the backward pass: with h = Pᵀ δ, which the input gradient needs anyway,

    ∂L/∂s_i = Σ_t h_ti z_ti ,      ∂L/∂x = Bᵀ (s ⊙ h)

so neither W' nor ∂L/∂W' is ever formed, and s ⊙ z is not kept. The dense weight stays inside: in teacher mode the same
module answers as the dense layer did, so no second model is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from soco_train.forms.stacked import balance
from soco_train.modules.layers import substituted, teaching
from soco_train.settings.train import ScoreFunction
from soco_train.store.spectra import Spectrum

Function = Callable[[torch.Tensor], torch.Tensor]

# θ → s and its inverse; the paper compares "functions" without naming them, so these three are ours. The clamp, unlike
# torch.relu, has a gradient at exactly 0: with θ projected to θ ≥ 0 a component that was pruned can come back.
SCORE_FUNCTIONS: Mapping[ScoreFunction, tuple[Function, Function]] = {
    "relu": (lambda theta: theta.clamp(min=0), lambda s: s),
    "softplus": (functional.softplus, lambda s: torch.log(torch.expm1(s.clamp(min=1e-6)))),
    "sigmoid2": (lambda theta: 2 * torch.sigmoid(theta), lambda s: torch.logit((s / 2).clamp(1e-6, 1 - 1e-6))),
}


class ScoredProduct(torch.autograd.Function):
    """y = P (s ⊙ B x) + shift with P, B frozen; keeps z = B x and nothing else of the activations."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, s: torch.Tensor, P: torch.Tensor, B: torch.Tensor, shift: torch.Tensor | None
    ) -> torch.Tensor:
        """x: [t, n], s: [k], P: [m, k], B: [k, n], shift: [m] or None → [t, m]."""
        z = x @ B.t()
        ctx.save_for_backward(z, s, P, B)
        ctx.shift_dtype = None if shift is None else shift.dtype
        # the shift rides along with the product; added afterwards it would cost another pass over y
        scaled = z * s.to(z.dtype)
        return scaled @ P.t() if shift is None else torch.addmm(shift.to(z.dtype), scaled, P.t())

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of x, s and the shift; sums over tokens run in the dtype of s and of the shift."""
        z, s, P, B = ctx.saved_tensors
        delta = gradients[0]
        h = delta @ P
        grad_x = (h * s.to(h.dtype)) @ B if ctx.needs_input_grad[0] else None
        grad_s = h.mul_(z).sum(0, dtype=s.dtype) if ctx.needs_input_grad[1] else None  # h is not needed any more
        grad_shift = delta.sum(0, dtype=ctx.shift_dtype) if ctx.needs_input_grad[4] else None
        return grad_x, grad_s, None, None, grad_shift


class ScoredLinear(nn.Module):
    """A Linear as scored singular components; `s` and `d` are set by the ScoreBank before each forward pass.

    P: [m, k], B: [k, n]; after `compact` only the columns and rows of `index` (into the full spectrum) remain.
    Input [..., n], output [..., m]. Source: arXiv 2502.15092.
    """

    P: torch.Tensor
    B: torch.Tensor
    index: torch.Tensor

    def __init__(self, linear: nn.Linear, spectrum: Spectrum, dtype: torch.dtype) -> None:
        super().__init__()
        self.dense = linear.requires_grad_(False)
        self.teaching = False
        self.left_dense = False
        device = linear.weight.device
        self.register_buffer("P", spectrum.P.to(device, dtype))
        self.register_buffer("B", spectrum.B.to(device, dtype))
        self.register_buffer("index", torch.arange(spectrum.sigma.numel(), device=device))
        self.s = torch.ones(spectrum.sigma.numel(), device=device)
        self.d: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return y: [..., m] in the dtype of x."""
        if self.teaching or self.left_dense:
            return self.dense(x)
        shift = self.d if self.dense.bias is None else self.dense.bias if self.d is None else self.d + self.dense.bias
        rows = x.to(self.P.dtype).flatten(0, -2)
        # shaped out here, for a model may change in place what a layer returns, but no view made inside the function
        return self.product(rows, shift).unflatten(0, x.shape[:-1]).to(x.dtype)

    def product(self, rows: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Return P (s ⊙ B x) + shift: [t, m]; rows: [t, n]."""
        y: torch.Tensor = ScoredProduct.apply(rows, self.s[self.index], self.P, self.B, shift)
        return y

    @torch.no_grad()
    def compact(self, support: torch.Tensor) -> None:
        """Drop the components outside `support` ([k] bool over the full spectrum); later steps get cheaper.

        A layer that keeps them all is one that the plan leaves dense: it answers as the dense layer from now on, as it
        will in the pruned model.
        """
        self.left_dense = bool(support.all())
        keep = support[self.index] & (not self.left_dense)
        self.P, self.B, self.index = self.P[:, keep].contiguous(), self.B[keep].contiguous(), self.index[keep]


class LearningLinear(ScoredLinear):
    """A ScoredLinear whose P and B learn as well, each component's norm shared evenly between them at first.

    Nothing is dropped: where the score is 0, so is every gradient.
    """

    def __init__(self, linear: nn.Linear, spectrum: Spectrum, dtype: torch.dtype) -> None:
        super().__init__(linear, spectrum, dtype)
        evened = balance(self.P, self.B)
        self.P, self.B = nn.Parameter(self.P * evened), nn.Parameter(self.B / evened[:, None])

    def product(self, rows: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
        """Return P (s ⊙ B x) + shift: [t, m]."""
        z = functional.linear(rows, self.B) * self.s.to(rows.dtype)
        return functional.linear(z, self.P, None if shift is None else shift.to(z.dtype))

    def compact(self, support: torch.Tensor) -> None:
        """Note whether the plan leaves this layer dense."""
        self.left_dense = bool(support.all())


class ScoreBank(nn.Module):
    """All scores of a model as two flat fp32 parameters, θ: [Σk] and deviation: [Σm].

    One tensor each, so that the size of the model is one vector expression and the optimiser one fused update.
    `support`: [Σk] bool; components outside it are exactly zero for good.
    """

    support: torch.Tensor

    def __init__(self, layers: Mapping[str, ScoredLinear], function: ScoreFunction, deviation: bool) -> None:
        super().__init__()
        self.names = list(layers)
        self._layers = list(layers.values())
        self.ranks = [layer.s.numel() for layer in self._layers]
        self.rows = [layer.dense.out_features for layer in self._layers]
        self.function, self.inverse = SCORE_FUNCTIONS[function]
        device = self._layers[0].P.device
        self.theta = nn.Parameter(self.inverse(torch.ones(sum(self.ranks), device=device)))
        self.deviation = nn.Parameter(torch.zeros(sum(self.rows), device=device)) if deviation else None
        self.register_buffer("support", torch.ones(sum(self.ranks), dtype=torch.bool, device=device))

    def scores(self) -> torch.Tensor:
        """Return s: [Σk] ≥ 0."""
        return self.function(self.theta) * self.support

    @torch.no_grad()
    def set_scores(self, s: torch.Tensor) -> None:
        """Choose θ so that `scores()` returns s: [Σk]."""
        self.theta.copy_(self.inverse(s.to(self.theta)))

    @torch.no_grad()
    def project(self) -> None:
        """Put θ back where s can reach: a score far below 0 would take as long to return as it took to go."""
        if self.function is SCORE_FUNCTIONS["relu"][0]:
            self.theta.clamp_(min=0)

    def install(self) -> torch.Tensor:
        """Hand each layer its part of s and d for the next forward pass; return s: [Σk]."""
        s = self.scores()
        for layer, part in zip(self._layers, s.split(self.ranks), strict=True):
            layer.s = part
        if self.deviation is not None:
            for layer, part in zip(self._layers, self.deviation.split(self.rows), strict=True):
                layer.d = part
        return s

    def restrict(self, support: torch.Tensor) -> None:
        """Freeze the support ([Σk] bool) and drop everything else from the layers physically."""
        self.support = self.support & support
        if bool(self.support.all()):  # nothing is cut; were every layer to answer as the dense one, nothing would train
            return
        for layer, part in zip(self._layers, self.support.split(self.ranks), strict=True):
            layer.compact(part)

    def per_layer(self, flat: torch.Tensor) -> dict[str, torch.Tensor]:
        """Cut a [Σk] tensor into [k] tensors by layer name."""
        return dict(zip(self.names, flat.split(self.ranks), strict=True))

    def teacher(self) -> AbstractContextManager[None]:
        """Within this context the model answers as the dense one, without gradients."""
        return teaching(self._layers)


def scored_model(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    spectra: Mapping[str, Spectrum],
    dtype: torch.dtype,
    learning: bool = False,
) -> AbstractContextManager[dict[str, ScoredLinear]]:
    """Put ScoredLinears in the place of `linears` for the duration of the context, then put the Linears back.

    learning: their components learn too.
    """
    kind = LearningLinear if learning else ScoredLinear
    return substituted(model, linears, lambda name, linear: kind(linear, spectra[name], dtype))
