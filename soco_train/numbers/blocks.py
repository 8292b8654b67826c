"""Block quantisation of a matrix as ONNX Runtime's MatMulNBits has it, rounded to nearest.

    w ≈ (level - zero) · scale        level in 0 … 2^bits - 1, one scale and zero per `block` inputs of each row

The last block of a row is padded with zeros, and so are its levels. Every scale is a number that float16 has, and
levels are chosen for that: files store scales in two bytes each and lose nothing by it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Grid:
    """The numbers that a rounded weight may take: bits (2, 4 or 8), inputs a block, zero in the middle or not."""

    bits: int
    block: int
    symmetric: bool

    @property
    def top(self) -> int:
        """The highest level."""
        return int(2**self.bits) - 1

    @property
    def half(self) -> int:
        """The level that a symmetric grid has zero at."""
        return int(2 ** (self.bits - 1))

    def blocks(self, weight: torch.Tensor) -> torch.Tensor:
        """weight: [m, n] → [m, ⌈n / block⌉, block], padded with zeros."""
        m, n = weight.shape
        return functional.pad(weight, (0, -n % self.block)).reshape(m, -1, self.block)


@dataclass(frozen=True)
class Levels:
    """A rounded matrix of `width` n: levels [m, blocks, block], scales and zeros [m, blocks], in one float dtype."""

    levels: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    width: int

    def rows(self, index: Any) -> Levels:
        """Return some rows, in another order perhaps."""
        return Levels(self.levels[index], self.scales[index], self.zeros[index], self.width)

    def values(self) -> torch.Tensor:
        """Return the matrix that the runtime multiplies with, [m, n]."""
        found = (self.levels - self.zeros[..., None]).mul_(self.scales[..., None])
        return found.flatten(1)[:, : self.width]


def stack(parts: Sequence[Levels]) -> Levels:
    """Return rounded matrices of one width below each other."""
    together = [torch.cat([getattr(part, name) for part in parts]) for name in ("levels", "scales", "zeros")]
    return Levels(together[0], together[1], together[2], parts[0].width)


def nearest(weight: torch.Tensor, grid: Grid) -> Levels:
    """Round a matrix [m, n] to the nearest levels of grids that reach to each block's largest number."""
    blocks = grid.blocks(weight)
    scales, zeros = (_symmetric if grid.symmetric else _asymmetric)(blocks, grid)
    return Levels(to_levels(blocks, scales, zeros, grid), scales, zeros, weight.shape[1])


def to_half(scales: torch.Tensor) -> torch.Tensor:
    """Return the nearest numbers that float16 has, in the dtype of `scales`."""
    return scales.half().to(scales.dtype)


def to_levels(blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the nearest levels of blocks [..., block] for given scales and zeros [...]; a half goes to even."""
    levels = blocks / torch.where(scales == 0, 1, scales)[..., None]
    return levels.round_().add_(zeros[..., None]).clamp_(0, grid.top)


def _symmetric(blocks: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros): the number of largest magnitude is at the end that has one level more."""
    low, high = blocks.amin(-1), blocks.amax(-1)
    extreme = torch.where(-low > high, low, high)
    return to_half(extreme / -grid.half), torch.full_like(extreme, grid.half)


def _asymmetric(blocks: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros): the range of the numbers and 0 is the whole range of levels, 0 is one of these."""
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    return with_range(low, high, grid)


def with_range(low: torch.Tensor, high: torch.Tensor, grid: Grid) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros) of grids from `low` ≤ 0 to `high` ≥ 0."""
    scales = to_half((high - low) / grid.top)
    return scales, (-low / torch.where(scales == 0, 1, scales)).round().clamp(0, grid.top)
