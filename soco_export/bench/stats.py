"""Statistics of timings, purely: percentiles that admit their sample, and ratios of paired rounds.

Wall times on shared machines drift two- to threefold, so two models are only ever compared inside one interleaved
series, and the uncertainty comes from resampling whole rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """Percentiles of `n` samples, in the samples' unit; None where n is too small to hold the percentile."""

    n: int
    p50: float | None
    p95: float | None
    p99: float | None


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its bootstrap interval (95 %) over `rounds` paired rounds."""

    value: float
    low: float
    high: float
    rounds: int


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


def paired_ratio(dense: Sequence[Sequence[float]], compressed: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """Return median(dense) / median(compressed) of interleaved rounds: above 1, the compressed model is faster.

    dense[i] and compressed[i] are the samples (> 0) of round i, equally many in every round. Rounds are resampled as
    pairs, so what slows both models in a round cancels. Raises ValueError unless there are 2 rounds or more.
    """
    a, b = np.asarray(dense, dtype=np.float64), np.asarray(compressed, dtype=np.float64)
    if a.ndim != 2 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f"need two equal series of ≥ 2 rounds, got shapes {a.shape} and {b.shape}")
    picks = np.random.default_rng(seed).integers(0, len(a), (RESAMPLES, len(a)))
    ratios = _medians(a[picks]) / _medians(b[picks])
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Ratio(float(np.median(a) / np.median(b)), float(low), float(high), len(a))


def _medians(resampled: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.median(resampled.reshape(len(resampled), -1), axis=1))


def render_percentile(value: float | None, n: int, unit: str = "ms") -> str:
    """Return "12.3 ms", or "n/a (n=30)" where the sample did not admit the percentile."""
    return f"n/a (n={n})" if value is None else f"{value:.4g} {unit}"
