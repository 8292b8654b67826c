"""Two models on the same text or items, as statistics, purely: what was lost, how surely, and agreement beyond chance.

A ratio of perplexities comes from the differences of the losses of the same blocks, in which what makes a block hard
for both models cancels.

Of a task, both models answer the same items, so only those count whose answer changed sides: of n items, `lost` were
right and are wrong, `gained` the other way round. The intervals come from those counts with a half added to each cell
of the 2 × 2 table, which keeps them honest where few or no answers changed (Agresti and Min 2005 for the difference;
the same counts in the delta method for the ratio, Bonett and Price 2006).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.bootstrap import NORMAL, mean_interval
from soco_export.evaluate.figures import PerplexityFigures

_SPARE = 0.5  # added to each cell

Bools = npt.NDArray[np.bool_]


def perplexity_interval(losses: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of exp(mean) of blocks' mean losses in nats, in order; None for fewer than two."""
    if len(losses) < 2:
        return None
    low, high = mean_interval(np.array(losses))
    return float(np.exp(low)), float(np.exp(high))


def perplexity_ratio(dense: PerplexityFigures, other: PerplexityFigures) -> tuple[float, tuple[float, float] | None]:
    """Return perplexity other / dense and its 95 % interval; None where they do not have the same blocks, two or more.

    Whether the blocks are of the same text is for the caller to know.
    """
    if len(dense.blocks) != len(other.blocks):
        return other.value / dense.value, None
    losses = [two - one for one, two in zip(dense.blocks, other.blocks, strict=True)]
    return other.value / dense.value, perplexity_interval(losses)


def _cells(before: Bools, after: Bools) -> tuple[float, float, float, float]:
    """Return how many items stayed right, were lost, were gained; and all; each with its spare."""
    counts = [np.count_nonzero(cell) + _SPARE for cell in (before & after, before & ~after, ~before & after)]
    return counts[0], counts[1], counts[2], len(before) + 4 * _SPARE


def difference_interval(before: Bools, after: Bools) -> tuple[float, float]:
    """Return the 95 % interval of accuracy after − before, of paired items [n] each."""
    _, lost, gained, n = _cells(before, after)
    middle = (gained - lost) / n
    spread = NORMAL * float(np.sqrt(lost + gained - (gained - lost) ** 2 / n)) / n
    return max(-1.0, middle - spread), min(1.0, middle + spread)


def ratio_interval(before: Bools, after: Bools) -> tuple[float, float]:
    """Return the 95 % interval of accuracy after / before, of paired items [n] each."""
    kept, lost, gained, _ = _cells(before, after)
    was, became = kept + lost, kept + gained
    middle = float(np.log(became / was))
    spread = NORMAL * float(np.sqrt((lost + gained) / (was * became)))
    return float(np.exp(middle - spread)), float(np.exp(middle + spread))


def chance_corrected(one: Sequence[int], two: Sequence[int]) -> float | None:
    """Return Cohen's kappa of two models' picks [n]: 1 = the same, 0 = as often the same as by chance.

    Chance: each picks as often as it does, independently. None where both always pick the same one thing.
    """
    first, second = np.asarray(one), np.asarray(two)
    same = float(np.mean(first == second))
    by_chance = sum(float(np.mean(first == pick) * np.mean(second == pick)) for pick in np.unique(first))
    return (same - by_chance) / (1 - by_chance) if by_chance < 1 else None
