"""Which blocks make a batch: a pure function of (seed, step), so a resumed run needs no iterator state."""

from __future__ import annotations

import torch


def batch_indices(blocks: int, size: int, step: int, seed: int) -> list[int]:
    """Return the `size` block indices of batch `step`: every epoch is its own seeded permutation of range(blocks)."""
    positions = range(step * size, (step + 1) * size)
    orders: dict[int, list[int]] = {}
    for epoch in {position // blocks for position in positions}:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        orders[epoch] = torch.randperm(blocks, generator=generator).tolist()
    return [orders[position // blocks][position % blocks] for position in positions]


def batch(tokens: torch.Tensor, batch_tokens: int, step: int, seed: int) -> torch.Tensor:
    """Return batch `step` of the blocks [n, t] as [b, t], b = max(1, batch_tokens // t)."""
    size = max(1, batch_tokens // tokens.shape[1])
    return tokens[batch_indices(len(tokens), size, step, seed)]
