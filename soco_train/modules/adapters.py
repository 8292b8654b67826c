"""Two frozen factors with few numbers beside each that are trained and then added: LoRA, or ALoRE's sum of experts.

    Δ = Σ_i A_i ⊗ (U_i V_iᵀ),    i = 1 … k,  A_i [k, k],  U_i [m/k, ρ],  V_i [n/k, ρ]

added to `up` and to `down`: k³ + ρ(m + n) numbers each for a rank of up to k²ρ, where LoRA's U Vᵀ, which this is for
k = 1, has ρ. Source: ALoRE (arXiv 2412.08341), whose experts adapt frozen dense layers; on the factors of a cut [ours].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn
from torch.nn import functional

from soco_train.forms.stacked import StackedFactors
from soco_train.modules.factored import FactorPair, Learning
from soco_train.settings.distill import AdapterSettings


class KroneckerSum(nn.Module):
    """Δ [m, n] as its parts, 0 at first; a side that k does not divide is cut from one that it does."""

    def __init__(self, shape: tuple[int, int], settings: AdapterSettings, seed: int) -> None:
        super().__init__()
        self.shape, k, rank = shape, settings.experts, settings.rank
        p, q = (math.ceil(side / k) for side in shape)
        generator = torch.Generator().manual_seed(seed)
        self.mix = nn.Parameter(torch.randn(k, k, k, generator=generator) / k if k > 1 else torch.ones(1, 1, 1))
        self.left = nn.Parameter(torch.zeros(k, p, rank))
        self.right = nn.Parameter(torch.randn(k, q, rank, generator=generator) * q**-0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return Δ x for input [..., n], without making Δ: output [..., m], in the dtype of x."""
        k, q, _ = self.right.shape
        mix, left, right = (part.to(x.dtype) for part in (self.mix, self.left, self.right))
        blocks = functional.pad(x, (0, k * q - self.shape[1])).unflatten(-1, (k, q))
        z = torch.einsum("...bj,ejr->...ebr", blocks, right)
        y = torch.einsum("...ear,eir->...ai", torch.einsum("eab,...ebr->...ear", mix, z), left)
        return y.flatten(-2)[..., : self.shape[0]]

    def matrix(self) -> torch.Tensor:
        """Return Δ [m, n] in float64."""
        mix, left, right = (part.detach().double() for part in (self.mix, self.left, self.right))
        whole = torch.einsum("eab,eir,ejr->aibj", mix, left, right).flatten(2).flatten(0, 1)
        return whole[: self.shape[0], : self.shape[1]]


class AdaptedPair(FactorPair):
    """The frozen factors of one layer with what is trained beside each; `numbers` has both in one."""

    def __init__(self, factors: StackedFactors, device: torch.device, settings: AdapterSettings, seed: int) -> None:
        super().__init__(factors, device)
        self.requires_grad_(False)
        (m, r), (_, n) = factors.up.shape, factors.down.shape
        self.beside_up = KroneckerSum((m, r), settings, 2 * seed).to(device)
        self.beside_down = KroneckerSum((r, n), settings, 2 * seed + 1).to(device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        z = functional.linear(x, self.down.to(x.dtype)) + self.beside_down(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return functional.linear(z, self.up.to(x.dtype), bias) + self.beside_up(z)

    def numbers(self) -> StackedFactors:
        """Return the factors with what was learnt added to them."""
        own = super().numbers()
        up, down = self.beside_up.matrix().cpu(), self.beside_down.matrix().cpu()
        return replace(own, up=(own.up.double() + up).float(), down=(own.down.double() + down).float())


def adapt(layers: Mapping[str, Learning], settings: AdapterSettings, seed: int) -> None:
    """Freeze the factors of every layer and train an adapter beside each."""
    for number, layer in enumerate(layers.values()):
        device = layer.dense.weight.device
        if isinstance(layer.learnt, FactorPair):
            layer.learnt = AdaptedPair(layer.learnt.numbers(), device, settings, len(layers) * seed + number)


def adapter_numbers(m: int, n: int, rank: float, settings: AdapterSettings) -> float:
    """Return how many numbers are trained beside the factors [m, rank] and [rank, n]."""
    return 2 * settings.experts**3 + settings.rank * (m + 2 * rank + n)
