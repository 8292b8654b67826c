import numpy as np
import pytest

from soco_export.evaluate import bootstrap
from soco_export.evaluate.figures import PerplexityFigures
from soco_export.evaluate.paired import (
    chance_corrected,
    difference_interval,
    perplexity_interval,
    perplexity_ratio,
    ratio_interval,
)
from tests.support import fresh


@pytest.fixture
def rng():
    return fresh.rng()


def figures(losses):
    loss = float(np.mean(losses))
    return PerplexityFigures(float(np.exp(loss)), loss, 10 * len(losses), tuple(losses))


def test_a_model_made_worse_by_a_known_factor_on_some_blocks_is_found(rng):
    dense = rng.normal(3, 0.8, 64)  # blocks differ far more than the models do
    noise = rng.normal(0, 0.01, 64)
    noise -= noise.mean()  # the factor of these very blocks is known; how often an interval misses is the next test's
    worse = dense + np.where(np.arange(64) % 4 == 0, np.log(1.3), 0) + noise
    truth = 1.3**0.25
    ratio, (low, high) = perplexity_ratio(figures(dense), figures(worse))
    assert ratio == pytest.approx(truth, rel=0.01)
    assert 1 < low < truth < high < 1.15
    ratio, (low, high) = perplexity_ratio(figures(worse), figures(dense))
    assert low < 1 / truth < high < 1
    alone = perplexity_interval(dense)
    assert alone[1] / alone[0] > 1.25, "of one model alone, the blocks' difficulty does not cancel"


def test_the_interval_of_a_ratio_holds_the_truth_95_times_in_100(rng, monkeypatch):
    monkeypatch.setattr(bootstrap, "RESAMPLES", 300)
    trials, held = 600, 0
    for _ in range(trials):
        dense = rng.normal(3, 0.8, 48)
        other = dense + 0.04 + 0.02 * (rng.gamma(2, 1, 48) - 2)
        low, high = perplexity_ratio(figures(dense), figures(other))[1]
        held += low <= np.exp(0.04) <= high
    assert 0.90 <= held / trials <= 0.985


def test_a_model_is_as_good_as_itself_and_other_blocks_give_no_interval(rng):
    one = figures(rng.normal(3, 1, 12))
    assert perplexity_ratio(one, one) == (1.0, (1.0, 1.0))
    assert perplexity_ratio(one, figures(rng.normal(3, 1, 11)))[1] is None
    assert perplexity_interval([2.0]) is None


@pytest.mark.parametrize(("n", "lost", "gained"), [(100, 0.1, 0.05), (40, 0.1, 0.1), (1000, 0.005, 0.002)])
def test_intervals_of_changed_answers_hold_the_truth_95_times_in_100(rng, n, lost, gained):
    trials = 2000
    draws = rng.random((trials, n))  # kept: half of the items, lost included
    before, after = draws < 0.5, (draws < 0.5 - lost) | ((draws >= 0.5) & (draws < 0.5 + gained))
    found = [(difference_interval(*pair), ratio_interval(*pair)) for pair in zip(before, after, strict=True)]
    difference = np.mean([low <= gained - lost <= high for (low, high), _ in found])
    ratio = np.mean([low <= (0.5 - lost + gained) / 0.5 <= high for _, (low, high) in found])
    assert 0.93 <= difference <= 0.99
    assert 0.93 <= ratio <= 0.99


def test_pairing_is_what_makes_small_losses_visible(rng):
    before = rng.random(400) < 0.5
    after = before.copy()
    after[np.flatnonzero(before)[:15]] = False
    low, high = difference_interval(before, after)
    assert low < -15 / 400 < high < 0
    assert ratio_interval(before, after)[1] < 1
    assert difference_interval(before, before)[0] < 0 < difference_interval(before, before)[1], "no change, not sure"


def test_kappa_is_0_by_chance_and_1_for_the_same(rng):
    one, two = rng.choice(4, 20_000, p=[0.7, 0.1, 0.1, 0.1]), rng.choice(4, 20_000, p=[0.7, 0.1, 0.1, 0.1])
    assert np.mean(one == two) > 0.5
    assert abs(chance_corrected(one, two)) < 0.03
    assert chance_corrected(one, one) == pytest.approx(1)
    assert chance_corrected([1, 1], [1, 1]) is None
    half = np.where(rng.random(20_000) < 0.5, one, two)
    assert chance_corrected(one, half) == pytest.approx(0.5, abs=0.03)
