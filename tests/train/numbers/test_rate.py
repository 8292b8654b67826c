"""What an entropy coder is expected to need, and that its gradient leads to less."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from soco_train.numbers.blocks import Grid, nearest
from soco_train.numbers.rate import bits_per_weight
from soco_train.settings.rounding import BITS, RoundingSettings

SHAPE = (24, 50)  # the last block of a row is not full


def settings(weights: str) -> RoundingSettings:
    return RoundingSettings.model_validate({"weights": weights, "block": 16})


def entropy(weight: torch.Tensor, how: RoundingSettings) -> float:
    """Return the bits a number that its levels take by their own frequencies, counted one by one."""
    grid = Grid(BITS[how.weights], how.block, how.symmetric)
    met = Counter(nearest(weight, grid).levels.flatten(1)[:, : SHAPE[1]].flatten().tolist())
    counts = {level: max(1, met[level]) for level in range(grid.top + 1)}
    return sum(met[level] * -math.log2(n / sum(counts.values())) for level, n in counts.items()) / math.prod(SHAPE)


@pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
def test_on_the_levels_it_is_what_their_frequencies_say(weights: str) -> None:
    how = settings(weights)
    rounded = nearest(torch.randn(SHAPE), Grid(BITS[weights], how.block, True)).values()
    assert float(bits_per_weight(rounded, how)) == pytest.approx(entropy(rounded, how), rel=1e-4)


@pytest.mark.parametrize("weights", ["int2", "int4", "int8"])
def test_steps_down_its_gradient_take_fewer_bits(weights: str) -> None:
    how, weight = settings(weights), torch.randn(SHAPE).requires_grad_()
    before = entropy(weight.detach(), how)
    for _ in range(20):
        bits_per_weight(weight, how).backward()
        with torch.no_grad():
            weight -= 0.02 * weight.grad.sign()
        weight.grad = None
    assert entropy(weight.detach(), how) < before - 0.1  # 0.3 to 1.4 in 120 draws


def test_between_two_levels_the_length_goes_in_a_line() -> None:
    how, grid, weight = settings("int4"), Grid(4, 16, True), torch.randn(SHAPE).requires_grad_()
    found = bits_per_weight(weight, how)
    found.backward()
    with torch.no_grad():
        scales = nearest(weight, grid).scales.repeat_interleave(16, 1)[:, : SHAPE[1]]
        place = (weight / scales).remainder(1)
        step = 0.2 * scales
        inside = (place > 0.05) & (place < 0.25)  # the step neither changes the level nor leaves the line
        for row, column in inside.nonzero()[:5].tolist():
            moved = weight.clone()
            moved[row, column] += step[row, column]
            change = float(bits_per_weight(moved, how) - found)
            assert change == pytest.approx(float(weight.grad[row, column] * step[row, column]), abs=2e-6)
