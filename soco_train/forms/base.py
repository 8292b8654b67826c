"""What every stored form of a low-rank layer has as a module: its first factor, sizes, a way back to dense."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import torch
from torch import nn


class FactoredLinear(nn.Module):
    """What the two forms share: `weight` [rank, in_features], sizes, and the way back to one dense nn.Linear."""

    kind: ClassVar[str]

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
