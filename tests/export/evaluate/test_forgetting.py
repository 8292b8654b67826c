"""What was forgotten is found where it was planted, and every figure is that of a plain loop in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soco_export.evaluate.bootstrap import mean_interval, pooled_intervals
from soco_export.evaluate.forgetting import (
    by_domain,
    by_kind,
    calibration_error,
    compare_readings,
    compare_texts,
    occurrences,
    repetition,
)
from soco_export.evaluate.perplexity import Readings, read_logits
from tests.support import fresh

WINDOWS, LENGTH, WORDS = 12, 61, 50


@pytest.fixture
def rng():
    return fresh.rng()


@pytest.fixture
def blocks(rng):
    """Return text in which some tokens are rare, as in every language."""
    return rng.choice(WORDS, (WINDOWS, LENGTH), p=(weights := 1 / np.arange(1, WORDS + 1)) / weights.sum())


@pytest.fixture
def dense(rng, blocks):
    shape = WINDOWS, LENGTH - 1
    draws = (rng.uniform(1, 2, shape), rng.uniform(0.1, 3, shape), rng.uniform(0.2, 1, shape))
    return Readings(*draws, top=np.where(rng.random(shape) < 0.6, blocks[:, 1:], WORDS))


def forgot(dense, blocks, extra):
    """Return what is found of a model that loses `extra` nats a token, and is sure of other tokens than dense is."""
    other = Readings(dense.loss + extra, dense.entropy[::-1, ::-1], dense.confidence, dense.top)
    return compare_readings(dense, other, blocks, ["a"] * WINDOWS)


def test_readings_are_those_of_a_softmax_in_double(rng):
    logits = rng.normal(scale=4, size=(300, 41)).astype(np.float32)
    logits[:, 7] = -np.inf  # a masked entry of the vocabulary
    targets = rng.integers(8, 41, 300)
    wanted = torch.distributions.Categorical(logits=torch.from_numpy(logits).double().clamp(min=-1e30))
    read = read_logits(logits, targets)
    np.testing.assert_allclose(read.loss, -wanted.log_prob(torch.from_numpy(targets)), rtol=2e-6, atol=2e-6)
    np.testing.assert_allclose(read.entropy, wanted.entropy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(read.confidence, wanted.probs.max(-1).values, rtol=2e-6)
    assert (read.top == logits.argmax(-1)).all()


def test_kinds_are_tenths_with_ties_together_and_the_means_of_their_tokens(rng):
    key = rng.integers(0, 25, (WINDOWS, LENGTH))
    dense, other = rng.uniform(1, 2, (2, WINDOWS, LENGTH))
    kinds = by_kind(key, dense, other)
    assert sum(kind.tokens for kind in kinds) == key.size
    assert 5 <= len(kinds) <= 10
    for kind, following in pairwise(kinds):
        assert kind.high < following.low
    for kind in kinds:
        chosen = (kind.low <= key) & (key <= kind.high)
        assert kind.tokens == chosen.sum() >= key.size / 10 * 0.2
        assert (kind.dense, kind.compressed) == (
            pytest.approx(dense[chosen].mean()),
            pytest.approx(other[chosen].mean()),
        )
        assert kind.interval[0] < kind.added < kind.interval[1]
    assert by_kind(key[:1], dense[:1], other[:1])[0].interval is None


def test_a_loss_on_rare_tokens_shows_among_the_rare_alone(rng, dense, blocks):
    counts = occurrences(blocks[:, 1:])
    rarest = np.quantile(counts, 0.1, method="higher")
    extra = np.where(counts <= rarest, 0.5, 0.0)
    found = forgot(dense, blocks, extra)
    assert found.rare_loss == found.frequency[0].added == pytest.approx(0.5)
    assert found.frequency[0].high == rarest
    assert [kind.added for kind in found.frequency[1:]] == pytest.approx([0.0] * (len(found.frequency) - 1))
    assert max(kind.added for kind in found.position) < 0.4


def test_a_loss_at_the_end_of_windows_and_where_dense_is_sure_shows_there(dense, blocks):
    late = np.arange(LENGTH - 1) >= LENGTH - 7
    found = forgot(dense, blocks, np.where(late, 1.0, 0.0))
    assert found.position[-1].added == pytest.approx(1.0)
    assert found.position[-1].high == LENGTH - 1
    assert found.position[0].added == pytest.approx(0.0)
    sure = dense.entropy <= np.quantile(dense.entropy, 0.1)
    found = forgot(dense, blocks, np.where(sure, 1.0, 0.0))
    assert found.entropy[0].added == pytest.approx(1.0, abs=0.05)
    assert found.entropy[-1].added == 0.0


def test_a_model_against_itself_forgot_nothing(dense, blocks):
    found = forgot(dense, blocks, 0.0)
    assert (found.lost, found.gained, found.agreement, found.ece_increase, found.rare_loss) == (0, 0, 1, 0, 0)
    assert {kind.interval for kinds in (found.frequency, found.entropy, found.position) for kind in kinds} == {
        (0.0, 0.0)
    }
    assert found.domains["a"].ratio == 1.0


def test_flips_are_counted_on_their_side(rng, dense, blocks):
    top, targets = dense.top.copy(), blocks[:, 1:]
    right, wrong = np.argwhere(top == targets)[:9], np.argwhere(top != targets)[:4]
    top[tuple(right.T)] = WORDS + 1
    top[tuple(wrong.T)] = targets[tuple(wrong.T)]
    found = compare_readings(dense, Readings(dense.loss, dense.entropy, dense.confidence, top), blocks, ["a"] * WINDOWS)
    assert (found.lost, found.gained) == (9 / targets.size, 4 / targets.size)
    assert found.accuracy_compressed - found.accuracy_dense == pytest.approx(-5 / targets.size)
    assert found.agreement == pytest.approx(1 - 13 / targets.size)


def test_calibration_is_the_distance_of_confidence_from_accuracy(rng):
    confidence = rng.uniform(0, 1, 4000)
    honest = rng.random(4000) < confidence
    assert calibration_error(confidence, honest) < 0.06
    assert calibration_error(np.full(1000, 0.9), np.arange(1000) < 400) == pytest.approx(0.5)
    edges = np.linspace(0, 1, 16)
    wanted = 0.0
    for low, high in pairwise(edges):
        inside = (confidence >= low) & (confidence < high)
        if inside.any():
            wanted += inside.mean() * abs(honest[inside].mean() - confidence[inside].mean())
    assert calibration_error(confidence, honest) == pytest.approx(wanted)
    assert calibration_error(np.ones(3), np.array([True, True, False])) == pytest.approx(1 / 3)


def test_a_text_that_suffers_more_is_named(dense, blocks):
    names = ["prose", "code", "prose"] * (WINDOWS // 3)
    extra = np.array([0.3 if name == "code" else 0.1 for name in names])[:, None]
    found = by_domain(names, dense.loss, dense.loss + extra)
    assert {name: one.ratio for name, one in found.items()} == {
        "prose": pytest.approx(np.exp(0.1)), "code": pytest.approx(np.exp(0.3)),
    }  # fmt: skip
    assert found["code"].tokens == (WINDOWS // 3) * (LENGTH - 1)
    assert found["code"].compressed / found["code"].dense == pytest.approx(found["code"].ratio)


def test_repetition_and_the_first_difference_of_greedy_texts(rng):
    fresh_text, loop = np.arange(40), np.tile(np.arange(5), 8)
    assert repetition(fresh_text) == 0.0
    assert repetition(loop) == 1 - 5 / 37
    assert repetition(loop[:3]) == 0.0
    other = fresh_text.copy()
    other[12:] = loop[:28]
    found = compare_texts([fresh_text, fresh_text], [other, fresh_text])
    assert (found.prompts, found.tokens, found.kept, found.dense) == (2, 40, 26.0, 0.0)
    assert found.repetition_increase == found.compressed == repetition(other) / 2 > 0.2
    assert compare_texts([], []) is None


@given(st.integers(0, 2**32 - 1))
def test_an_interval_of_equal_windows_is_that_of_their_means(seed):
    sums = np.random.default_rng(seed).normal(size=(17, 1)) * 4
    assert pooled_intervals(sums, np.full((17, 1), 4.0))[0] == pytest.approx(mean_interval(sums[:, 0] / 4))
