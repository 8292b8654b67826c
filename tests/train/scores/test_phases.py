"""The timetable: who comes when, and what a phase that ends early moves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_train.scores.phases import Timetable
from soco_train.settings.train import PhaseSettings, TrainSettings


def preset(shares: tuple[float, float, float], freeze: float, steps: int = 100) -> Timetable:
    return Timetable.preset(TrainSettings(steps=steps, schedule=PhaseSettings(shares=shares, freeze=freeze)))


@given(
    st.tuples(*[st.integers(1, 9)] * 3),
    st.floats(0, 0.99),
    st.integers(1, 300),
    st.lists(st.integers(0, 299), max_size=3),
)
def test_a_phase_that_ends_early_leaves_the_frozen_finish_as_long_as_it_was(
    shares: tuple[int, int, int], freeze: float, steps: int, ends: list[int]
) -> None:
    timetable = preset(shares, freeze, steps)
    finish, step = timetable.steps - timetable.freeze, -1
    for end in sorted(set(ends)):
        if step < end < timetable.freeze:
            timetable.end_phase(end)
            step = end
            assert timetable.freeze > step, "what is over stays over"
            assert timetable.steps - timetable.freeze == finish
            assert timetable.begins == sorted(timetable.begins)


def test_a_phase_that_would_begin_in_the_frozen_finish_saves_nothing_by_being_left_out() -> None:
    timetable = preset((0.1, 0.8, 0.1), 0.5)
    timetable.end_phase(20)
    assert (timetable.freeze, timetable.steps) == (21, 71)


def test_an_ended_phase_hands_over_at_the_next_step() -> None:
    timetable = preset((0.3, 0.4, 0.3), 0.1)
    timetable.end_phase(20)
    assert [timetable.index(step) for step in (20, 21)] == [0, 1]
    assert (timetable.begins, timetable.freeze, timetable.steps) == ([0, 21, 61], 81, 91)


def test_the_falling_target_is_met_before_the_support_freezes() -> None:
    train = TrainSettings(steps=100, schedule=PhaseSettings(shares=(0.8, 0.1, 0.1), freeze=0.5))
    orders = Timetable.preset(train).orders(49, train, start_size=1.0, keep_params=0.6)
    assert (orders.phase, orders.frozen) == (1, False)
    assert orders.target == pytest.approx(0.6)
