"""Training curves: every step once, whatever was interrupted where."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_export.run.stages.curve import read_curve, recording
from soco_train.errors import DataError
from soco_train.events import Event, silent

STEPS = 12


def tell(notify, step: int) -> None:
    notify(Event("fisher", step, STEPS))  # no training: no row
    notify(Event("train", step, STEPS, {"kl": 1 / step, "phase": 1, "tokens/s": 5.0 * step}, record={"lr": 0.1}))
    if step % 4 == 0:
        notify(Event("train", step, STEPS, {"held-out loss": step / 2}, record={"lr": 0.1}))


@given(kills=st.lists(st.integers(1, STEPS), max_size=4), every=st.integers(1, 5), half=st.booleans())
def test_an_interrupted_training_leaves_the_curve_of_a_straight_one(
    tmp_path_factory: pytest.TempPathFactory, kills: list[int], every: int, half: bool
) -> None:
    folder, saved = tmp_path_factory.mktemp("curve"), 0
    kept, result = folder / "work" / "curve.jsonl", folder / "evidence" / "train.jsonl"
    for kill in (*kills, STEPS + 1):
        try:
            with recording(silent, kept, result) as notify:
                for step in range(saved + 1, STEPS + 1):
                    if step == kill:
                        raise KeyboardInterrupt
                    tell(notify, step)
                    saved = step if step % every == 0 and step < STEPS else saved
            break
        except KeyboardInterrupt:
            assert not result.exists()
            if half:
                with kept.open("a") as file:
                    file.write('{"stage": "tra')
    rows = read_curve(result)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["kl"] == 1 / row["step"] and row["lr"] == 0.1 and "tokens/s" not in row for row in rows)
    assert {row["step"]: row["held-out loss"] for row in rows if "held-out loss" in row} == {4: 2.0, 8: 4.0, 12: 6.0}


def test_every_event_is_passed_on(tmp_path: Path) -> None:
    seen: list[Event] = []
    with recording(seen.append, tmp_path / "kept", tmp_path / "result") as notify:
        tell(notify, 4)
    assert [event.stage for event in seen] == ["fisher", "train", "train"]


@pytest.mark.parametrize(
    "line",
    ["nope", "[1]", '{"step": 1}', '{"stage": "a", "step": "1"}', '{"stage": "a", "step": 1, "kl": NaN}', "[" * 9999],
)
def test_a_file_that_is_no_curve_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"stage": "train", "step": 1}) + f"\n{line}\n")
    with pytest.raises(DataError, match="line 2 is no step"):
        read_curve(path)
