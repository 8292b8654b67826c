import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_export.bench.stats import paired_ratio, percentile, render_percentile, summarise
from tests.support import fresh

TIMES = st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=150)


@given(TIMES)
def test_a_percentile_exists_exactly_when_the_sample_holds_it(samples):
    summary = summarise(samples)
    n = len(samples)
    assert summary.n == n
    assert (summary.p50 is not None) == (n >= 2)
    assert (summary.p95 is not None) == (n >= 20)
    assert (summary.p99 is not None) == (n >= 100)


@given(TIMES, st.floats(min_value=0.01, max_value=0.99))
def test_a_percentile_is_the_linear_quantile_by_hand(samples, share):
    found = percentile(samples, share)
    if found is None:
        return
    ordered = sorted(samples)
    rank = share * (len(samples) - 1)
    below = int(rank)
    above = min(below + 1, len(samples) - 1)
    assert found == pytest.approx(ordered[below] + (rank - below) * (ordered[above] - ordered[below]))


@given(TIMES)
def test_percentiles_are_ordered_and_inside_the_sample(samples):
    known = [value for value in (summarise(samples).p50, summarise(samples).p95, summarise(samples).p99) if value]
    assert known == sorted(known)
    assert all(min(samples) <= value <= max(samples) for value in known)


@given(st.integers(2, 20), st.integers(1, 3), st.floats(min_value=0.1, max_value=10), st.integers(0, 2**31))
def test_an_exact_factor_is_found_with_no_uncertainty(rounds, samples, factor, seed):
    dense = np.random.default_rng(seed).uniform(1, 3, (rounds, samples))
    ratio = paired_ratio(dense, dense / factor)
    assert ratio.value == pytest.approx(factor)
    assert ratio.low == pytest.approx(factor)
    assert ratio.high == pytest.approx(factor)
    assert ratio.rounds == rounds


def test_noise_that_both_models_share_cancels_and_noise_of_their_own_does_not():
    rng = fresh.rng()
    drift = rng.uniform(1, 3, (40, 1))
    shared = paired_ratio(drift * rng.normal(1, 0.001, (40, 1)), drift / 1.5)
    own = paired_ratio(drift, rng.permutation(drift) / 1.5)
    assert shared.high - shared.low < 0.2 * (own.high - own.low)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = fresh.rng()
    covered = 0
    for trial in range(100):
        ratio = paired_ratio(1.4 * rng.lognormal(0, 0.2, (40, 1)), rng.lognormal(0, 0.2, (40, 1)), seed=trial)
        covered += ratio.low <= 1.4 <= ratio.high
    assert covered >= 83


def test_the_interval_is_the_same_for_the_same_seed():
    rng = fresh.rng()
    dense, compressed = rng.uniform(1, 2, (2, 60, 2))
    assert paired_ratio(dense, compressed, seed=3) == paired_ratio(dense, compressed, seed=3)
    # An interval's ends are medians of rounds, of which few come into question: two seeds may agree, thirty do not.
    assert len({paired_ratio(dense, compressed, seed=seed) for seed in range(30)}) > 1


@pytest.mark.parametrize(
    ("dense", "compressed"), [([[1.0]], [[1.0]]), ([[1.0], [2.0]], [[1.0]]), ([1.0, 2.0], [1.0, 2.0])]
)
def test_series_that_cannot_be_paired_are_refused(dense, compressed):
    with pytest.raises(ValueError, match="2 rounds"):
        paired_ratio(dense, compressed)


def test_a_missing_percentile_says_why():
    assert render_percentile(summarise([1.0] * 30).p99, 30) == "n/a (n=30)"
    assert render_percentile(12.3456, 30) == "12.35 ms"
