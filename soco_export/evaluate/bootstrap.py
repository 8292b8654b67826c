"""Uncertainty of a median or a mean over a series, by the moving-block bootstrap, purely.

Rounds of a benchmark follow one another: what slows one down (another process, the clock) slows its neighbours too, and
the windows of a text go on where the one before ends.
Resampling single rounds takes them as independent and promises too much; whole blocks of neighbours keep what they have
in common (Künsch 1989; Politis and Romano 1992, circular blocks).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CONFIDENCE = 0.95
NORMAL = 1.959964
# 97.5 % quantile of Student's t by degrees of freedom; between them linear in 1 / degrees.
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 8: 2.306, 10: 2.228, 15: 2.131, 30: 2.042}
FEWEST_BLOCKS = 8  # fewer would say nothing of how much blocks differ

_Reals = npt.NDArray[np.float64]


def block_length(series: _Reals) -> int:
    """Return how many neighbours to resample together: a few times as long as the series remembers itself.

    That memory is the integrated autocorrelation time, 1 + 2 Σ ρ(lag) up to the first lag with ρ ≤ 0; never fewer
    than n^⅓, the rate at which blocks must grow, and never so many that fewer than FEWEST_BLOCKS are left.
    """
    n = len(series)
    centred = series - series.mean()
    variance = float(centred @ centred)
    memory = 1.0
    for lag in range(1, n // 2 if variance > 0 else 0):
        correlation = float(centred[lag:] @ centred[:-lag]) / variance
        if correlation <= 0:
            break
        memory += 2 * correlation
    return int(min(max(np.ceil(n ** (1 / 3)), np.ceil(2 * memory)), max(1, n // FEWEST_BLOCKS)))


def picks(n: int, block: int, resamples: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Return indices [resamples, n]: each row is made of random runs of `block` neighbours, first after last."""
    starts = np.random.default_rng(seed).integers(0, n, (resamples, -(-n // block)))
    runs = (starts[:, :, None] + np.arange(block)) % n
    return np.asarray(runs.reshape(resamples, -1)[:, :n])


def median_interval(series: _Reals, seed: int = 0) -> tuple[float, float, float, int]:
    """Return the median of a series, the ends of its 95 % interval, and the block length.

    series: [n], in the order of time.
    """
    block = block_length(series)
    medians = np.median(series[picks(len(series), block, RESAMPLES, seed)], axis=1)
    return float(np.median(series)), *_ends(float(np.median(series)), medians, len(series) / block), block


def mean_interval(series: _Reals) -> tuple[float, float]:
    """Return the ends of the 95 % interval of a series' mean; series: [n] in its order, n ≥ 2."""
    block = block_length(series)
    means = series[picks(len(series), block, RESAMPLES)].mean(axis=1)
    return _ends(float(series.mean()), means, len(series) / block)


def pooled_intervals(sums: _Reals, counts: _Reals) -> list[tuple[float, float]]:
    """Return the 95 % intervals of pooled means Σ sums / Σ counts; both [n, k], rows in their order, n ≥ 2."""
    block = block_length(sums.sum(1) / counts.sum(1))
    times = np.stack([np.bincount(row, minlength=len(sums)) for row in picks(len(sums), block, RESAMPLES)])
    with np.errstate(invalid="ignore"):  # a kind that is in few rows may be in none of those drawn
        means = (times @ sums) / (times @ counts)
    middles = sums.sum(0) / counts.sum(0)
    pairs = zip(middles, means.T, strict=True)
    return [_ends(float(middle), drawn[np.isfinite(drawn)], len(sums) / block) for middle, drawn in pairs]


def _ends(middle: float, resampled: _Reals, blocks: float) -> tuple[float, float]:
    """Return the ends of an interval; of few blocks it is stretched as Student's t is beside the normal."""
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    stretch = student(blocks - 1) / NORMAL
    return middle - stretch * (middle - float(low)), middle + stretch * (float(high) - middle)


def quantile_interval(rounds: Sequence[Sequence[float]], share: float) -> tuple[float, float]:
    """Return the 95 % interval of the `share` quantile of all samples; rounds are resampled in blocks.

    The rounds may hold different numbers of samples.
    """
    arrays = [np.asarray(samples, dtype=np.float64) for samples in rounds]
    block = block_length(np.array([np.quantile(samples, share) for samples in arrays]))
    chosen = picks(len(arrays), block, RESAMPLES // 10)  # of thousands of samples: the tenth is exact enough
    found = [np.quantile(np.concatenate([arrays[i] for i in row]), share) for row in chosen]
    low, high = np.quantile(found, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def student(degrees: float) -> float:
    """Return the 97.5 % quantile of Student's t."""
    inverse = [*(1 / known for known in reversed(STUDENT))]
    values = [*reversed(STUDENT.values())]
    return float(np.interp(1 / max(degrees, 1.0), [0.0, *inverse], [NORMAL, *values]))
