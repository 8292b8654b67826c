"""A Linear as singular components under binary masks, with an adapter beside them or inside the inner factor.

    y = P (1[p > 0] ⊙ B x) + α C A x + bias        beside, as published
    y = P (1[p > 0] ⊙ (B x + α C A x)) + bias      inside [ours]

The forward pass sees binary masks; gradients pass straight through to p (arXiv 2502.01717).
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

from soco_train.store.spectra import Spectrum

ADAPTER_RANK = 8  # published: 32 beside 4096 components
ADAPTER_SCALE = 0.5  # α: published, lora_alpha 16 over rank 32


class MaskedLinear(nn.Module):
    """A Linear as masked singular components with an adapter; p: [k], C: [k, r], or [m, r] `beside`, A: [r, n]."""

    P: torch.Tensor
    B: torch.Tensor

    def __init__(
        self, linear: nn.Linear, spectrum: Spectrum, dtype: torch.dtype, seed: int, beside: bool = False
    ) -> None:
        super().__init__()
        self.dense = linear.requires_grad_(False)
        self.left_dense, self.beside = False, beside
        device, k, n = linear.weight.device, spectrum.sigma.numel(), linear.in_features
        self.register_buffer("P", spectrum.P.to(device, dtype))
        self.register_buffer("B", spectrum.B.to(device, dtype))
        self.p = nn.Parameter(torch.full((k,), k**-0.5, device=device))
        start = torch.rand(ADAPTER_RANK, n, generator=torch.Generator().manual_seed(seed)).mul_(2).sub_(1) * n**-0.5
        self.C = nn.Parameter(torch.zeros(len(self.P) if beside else k, ADAPTER_RANK, device=device))
        self.A = nn.Parameter(start.to(device))

    @property
    def adapter_rank(self) -> int:
        """Return the ranks that the adapter takes of those planned for the layer: none where it is merged."""
        return len(self.A) if self.beside else 0

    def mask(self) -> torch.Tensor:
        """Return 1[p > 0] with the gradient of √k relu(p), whose value at the start is 1 too."""
        passed = self.p.clamp(min=0) * self.p.numel() ** 0.5
        return (self.p > 0).to(self.p) + passed - passed.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        if self.left_dense:
            return self.dense(x)
        inner = x.to(self.P.dtype)
        adapted = functional.linear(functional.linear(inner, self.A.to(inner.dtype)), self.C.to(inner.dtype))
        z = functional.linear(inner, self.B)
        if not self.beside:
            z = z + ADAPTER_SCALE * adapted
        bias = None if self.dense.bias is None else self.dense.bias.to(inner.dtype)
        y = functional.linear(z * self.mask().to(z.dtype), self.P, bias)
        return (y + ADAPTER_SCALE * adapted if self.beside else y).to(x.dtype)
