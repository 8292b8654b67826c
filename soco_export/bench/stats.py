"""Statistics of timings, purely: percentiles that admit their sample, and ratios of paired rounds.

Wall times on shared machines drift two- to threefold, so two models are only ever compared inside one interleaved
series: each round gives one ratio, from samples that were taken side by side. The uncertainty is that of the rounds'
ratios as a series in time (bootstrap.py) and, where the dense model was also timed against itself, what that came to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from soco_export.evaluate.bootstrap import median_interval, quantile_interval

DRAWN = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Summary:
    """Percentiles of `n` samples, in the samples' unit; None where n is too small to hold the percentile.

    `*_interval`: low and high end of the percentile's 95 % interval, None where it was not asked for; `quantiles`: at
    5, 25, 50, 75 and 95 %, to draw the distribution, whatever n.
    """

    n: int
    p50: float | None
    p95: float | None
    p99: float | None
    p50_interval: tuple[float, float] | None = None
    p95_interval: tuple[float, float] | None = None
    quantiles: tuple[float, ...] = ()


@dataclass(frozen=True)
class Ratio:
    """Median of the ratios of `rounds` paired rounds, with its 95 % interval; `block` rounds are resampled as one."""

    value: float
    low: float
    high: float
    rounds: int
    block: int = 1

    @property
    def within_noise(self) -> bool:
        """Whether the interval contains 1: no difference was measured."""
        return self.low <= 1 <= self.high


def percentile(samples: Sequence[float], share: float) -> float | None:
    """Return the `share` quantile (0 < share < 1, linear between ranks), or None if too few samples lie above it.

    One sample in expectation must lie above: p50 needs 2 samples, p95 20, p99 100.
    """
    if len(samples) * (1 - share) < 1 - 1e-9:
        return None
    return float(np.quantile(np.asarray(samples, dtype=np.float64), share))


def summarise(samples: Sequence[float]) -> Summary:
    """Return the percentiles that `samples` admits."""
    return Summary(len(samples), percentile(samples, 0.5), percentile(samples, 0.95), percentile(samples, 0.99))


def summarise_rounds(rounds: Sequence[Sequence[float]]) -> Summary:
    """Return the percentiles of all samples of a series, with intervals for the median and for p95."""
    everything = [sample for samples in rounds for sample in samples]
    found = summarise(everything)
    return replace(
        found,
        quantiles=tuple(float(value) for value in np.quantile(everything, DRAWN)),
        p50_interval=None if found.p50 is None else quantile_interval(rounds, 0.5),
        p95_interval=None if found.p95 is None else quantile_interval(rounds, 0.95),
    )


def paired_ratio(
    dense: Sequence[Sequence[float]],
    compressed: Sequence[Sequence[float]],
    seed: int = 0,
    control: Ratio | None = None,
) -> Ratio:
    """Return how many times faster the compressed model is: the median over rounds of dense / compressed.

    dense[i] and compressed[i] are the samples (> 0) of round i; each round counts with the ratio of its medians, so
    that what slows both models in a round cancels. `control`: the same of the dense model against itself, truly 1: the
    farthest that its interval lies from 1 is added to this one, as independent errors are (root of the sum of
    squares of logarithms). Raises ValueError unless there are 2 rounds or more of both.
    """
    if len(dense) < 2 or len(dense) != len(compressed) or np.ndim(dense[0]) != 1:
        raise ValueError(f"need two equal series of ≥ 2 rounds of samples, got {len(dense)} and {len(compressed)}")
    ratios = np.log([np.median(one) / np.median(two) for one, two in zip(dense, compressed, strict=True)])
    value, low, high, block = median_interval(ratios, seed)
    noise = 0.0 if control is None else max(abs(math.log(control.low)), abs(math.log(control.high)))
    low, high = value - math.hypot(value - low, noise), value + math.hypot(high - value, noise)
    return Ratio(math.exp(value), math.exp(low), math.exp(high), len(ratios), block)


def render_percentile(value: float | None, n: int) -> str:
    """Return "12.3 ms", or "n/a (n=30)" where the sample did not admit the percentile."""
    return f"n/a (n={n})" if value is None else f"{value:.4g} ms"
