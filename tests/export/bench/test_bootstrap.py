import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_export.bench.stats import Ratio, paired_ratio, summarise_rounds
from soco_export.evaluate import bootstrap
from soco_export.evaluate.bootstrap import block_length, median_interval, picks, quantile_interval, student
from tests.support import fresh


def remembering(rng, n, memory, spread=0.1):
    """A series in which each value is `memory` of the one before, and noise: AR(1) with standard deviation `spread`."""
    found = np.empty(n)
    found[0] = rng.normal()
    for i in range(1, n):
        found[i] = memory * found[i - 1] + rng.normal() * np.sqrt(1 - memory**2)
    return spread * found


def rounds(logarithms):
    return [[float(np.exp(value))] for value in logarithms]


@given(st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31))
def test_rows_are_runs_of_neighbours(n, block, seed):
    found = picks(n, min(block, n), 5, seed)
    assert found.shape == (5, n)
    assert found.min() >= 0
    assert found.max() < n
    steps = (np.diff(found, axis=1) % n == 1 % n).reshape(5, -1)
    inside = np.arange(1, n) % min(block, n) != 0
    assert steps[:, inside].all()


def test_blocks_are_as_long_as_the_series_remembers():
    rng = fresh.rng()
    lengths = {memory: np.mean([block_length(remembering(rng, 400, memory)) for _ in range(10)]) for memory in (0, 0.9)}
    assert 8 <= lengths[0] <= 10  # n^⅓
    assert 2 * lengths[0] < lengths[0.9] <= 50
    assert block_length(np.zeros(64)) == 4
    assert [block_length(np.arange(float(n))) for n in (2, 7, 16)] == [1, 1, 2]  # FEWEST_BLOCKS where there are few


def false_alarms(trials, n, memory, control):
    rng = fresh.rng()
    found = 0
    for _ in range(trials):
        drift = remembering(rng, n, 0.97, 0.5)  # what slows the whole machine: in every model's times
        dense, copy, again = (rounds(drift + remembering(rng, n, memory)) for _ in range(3))
        itself = paired_ratio(dense, again) if control else None
        ratio = paired_ratio(dense, copy, control=itself)
        found += not ratio.low <= 1 <= ratio.high
    return found / trials


def test_a_copy_is_rarely_faster_or_slower_though_rounds_remember(monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 400)
    assert false_alarms(150, 120, 0.8, control=True) <= 0.07
    assert false_alarms(150, 120, 0.8, control=False) <= 0.22
    monkeypatch.setattr(bootstrap, "block_length", lambda series: 1)
    assert false_alarms(100, 120, 0.8, control=False) > 0.3, "rounds taken as independent are what this guards against"


def test_a_difference_beyond_the_noise_is_found_on_its_side():
    rng = fresh.rng()
    for truth in (0.7, 1.5):
        dense, again = (rounds(remembering(rng, 200, 0.5, 0.05)) for _ in range(2))
        other = rounds(remembering(rng, 200, 0.5, 0.05) - np.log(truth))
        ratio = paired_ratio(dense, other, control=paired_ratio(dense, again))
        assert ratio.low < truth < ratio.high
        assert (ratio.low > 1) if truth > 1 else (ratio.high < 1)


def test_the_interval_is_that_of_a_median_at_95_percent():
    rng = fresh.rng()
    widths = []
    for _ in range(12):  # one width is itself uncertain
        _, low, high, _ = median_interval(rng.normal(0, 1, 1000))
        widths.append(high - low)
    # an 80 % interval has 0.65 of that
    assert np.mean(widths) == pytest.approx(2 * 1.96 * np.sqrt(np.pi / 2 / 1000), rel=0.15)
    normal = rng.normal(0, 1, 4000)
    sick = normal.copy()
    sick[:800] = 1e9  # a fifth of the rounds interrupted: a mean would be lost
    assert all(abs(end) < 1 for end in median_interval(rng.permutation(sick))[:3])


def test_few_blocks_stretch_the_interval_as_student_does():
    assert student(1) == pytest.approx(12.706)
    assert student(7) == pytest.approx(2.365, abs=0.02)
    assert student(1e9) == pytest.approx(1.96, abs=0.001)
    assert student(0.2) == student(1)
    _, low, high, _ = median_interval(np.array([0.0, 1.0]))  # two rounds say next to nothing
    assert low < -2
    assert high > 3


def test_noise_of_dense_against_itself_goes_into_the_interval():
    exact = [[1.0]] * 10
    for control in (Ratio(1.0, 0.8, 1.1, 10), Ratio(1.0, 1 / 1.1, 1.25, 10)):
        ratio = paired_ratio([[1.5]] * 10, exact, control=control)
        assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5 * 0.8, 1.5 / 0.8))


def test_percentiles_of_a_series_have_intervals_around_them():
    rng = fresh.rng()
    series = [list(rng.lognormal(0, 0.3, rng.integers(3, 9))) for _ in range(60)]
    found = summarise_rounds(series)
    assert found.n == sum(map(len, series))
    assert found.p50_interval[0] < found.p50 < found.p50_interval[1]
    assert found.p95_interval[0] <= found.p95 <= found.p95_interval[1]
    assert found.p50_interval[1] < found.p95_interval[0]
    assert summarise_rounds([[1.0, 2.0]] * 3).p95_interval is None
    steady = quantile_interval([[2.0], [2.0, 2.0]], 0.5)
    assert steady == (2.0, 2.0)
