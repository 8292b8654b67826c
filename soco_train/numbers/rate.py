"""What a rounded matrix takes in an entropy coder, as a number that has a gradient.

A level that is met with probability p takes -log2 p bits (Shannon). Between two levels the length is interpolated, so a
weight is drawn to the cheaper of the two it lies between, by the difference of their lengths over the distance of the
levels; the frequencies and scales are those of the matrix as it is and have no gradient. After "end-to-end learning of
compressible features" (arXiv 2007.11797), which learns the prior that is counted here.
"""

from __future__ import annotations

import torch

from soco_train.numbers.blocks import Grid, Levels
from soco_train.numbers.rules import find_rounding
from soco_train.settings.rounding import BITS, RoundingSettings


def bits_per_weight(weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
    """Return how many bits a number of `weight` [m, n] is expected to take, a scalar in float32 with a gradient."""
    grid = Grid(BITS[settings.weights], settings.block, settings.symmetric)
    with torch.no_grad():
        found = find_rounding(settings.rule).rows(weight.detach().float(), grid)
        lengths = code_lengths(found, grid)
        scales = torch.where(found.scales == 0, 1, found.scales)[..., None]
    place = (grid.blocks(weight.float()) / scales + found.zeros[..., None]).clamp(0, grid.top)
    below = place.detach().floor().clamp(max=grid.top - 1).long()
    steps = lengths.diff()
    here = lengths[below] + (place - below) * steps[below]
    # the last block of a row is padded, and what pads it is no weight
    return here.flatten(1)[:, : found.width].mean()


def code_lengths(found: Levels, grid: Grid) -> torch.Tensor:
    """Return the bits that each level 0 … top takes, [levels] in float32; one that never occurs counts as met once."""
    met = found.levels.flatten(1)[:, : found.width].long().flatten().bincount(minlength=grid.top + 1)
    counts = met.clamp(min=1).float()
    return -(counts / counts.sum()).log2()
