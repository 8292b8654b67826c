"""From what was measured to all layers and all tokens of the recipe, by multiplications. Pure.

A training step passes every token once through the dense model (the teacher), once forward through the components, once
backward, and with recomputed activations once more forward through the blocks; frozen weights need no products of their
own gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

H100_FLOPS = 989e12  # dense bf16, SXM


@dataclass(frozen=True)
class Sizes:
    """shapes: (m, n) of the participating Linears of one block; head: numbers of the output head."""

    shapes: Sequence[tuple[int, int]]
    head: int

    def step_flops(self, layers: int, recomputed: bool) -> float:
        """Multiply-adds ×2 that one token takes in a training step of `layers` blocks, attention itself not counted."""
        dense = layers * sum(m * n for m, n in self.shapes)
        factors = layers * sum(min(m, n) * (m + n) for m, n in self.shapes)
        student = (3 if recomputed else 2) * factors + 2 * self.head
        return 2.0 * (dense + self.head + student)

    def distillation_flops(self, layers: int, factors: int, recomputed: bool) -> float:
        """As `step_flops` for a distillation, whose `factors` (numbers in them, of all layers) get gradients of theirs.

        The optimiser's own products are not counted.
        """
        dense = layers * sum(m * n for m, n in self.shapes)
        student = (4 if recomputed else 3) * factors + 2 * self.head
        return 2.0 * (dense + self.head + student)


def hours_of_decomposition(parts: Mapping[str, Mapping[str, Any]], alike: Mapping[str, int], layers: int) -> float:
    """Return the hours for all layers; alike: of the layers that were measured, how many of its kind a block has."""
    seconds: dict[str, float] = {}
    for part in parts.values():
        seconds |= part["layers"]
    if set(seconds) == set(alike):  # one layer spoke for its kind in every block
        return layers * sum(alike[name] * spent for name, spent in seconds.items()) / 3600
    return sum(seconds.values()) / 3600


def training(part: Mapping[str, Any], sizes: Sizes, layers: int, tokens: float, recomputed: bool) -> dict[str, float]:
    """Return what was measured and what `layers` blocks and `tokens` would take at the same FLOP/s."""
    measured = part["size"]["layers"]
    speed = part["tokens"] / median(part["step_seconds"])
    flops = speed * sizes.step_flops(measured, recomputed)
    whole = flops / sizes.step_flops(layers, recomputed)
    return {
        "tokens_per_second": speed,
        "flops": flops,
        "tokens_per_second_all_layers": whole,
        "hours_all_tokens": tokens / whole / 3600,
        "h100_hours_at_40_percent": tokens * sizes.step_flops(layers, recomputed) / (0.4 * H100_FLOPS) / 3600,
    }
