"""benchmarks.draft: the text stays the target's own, and what is counted is what happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import draft
from soco_export.evaluate.settings import CPU
from tests.support import fresh

COUNT, AHEAD = 12, 3


@pytest.fixture(scope="module")
def target(tiny_run: Path) -> draft.Rewindable:
    return draft.Rewindable(tiny_run / "onnx-dense", CPU, 1, "target")


def test_a_speculated_text_is_the_targets_greedy_text(target: draft.Rewindable, tiny_run: Path) -> None:
    propose = draft.from_model(draft.Rewindable(tiny_run / "onnx", CPU, 1, "draft"))
    for prompt in fresh.rng().integers(0, 500, (3, 20)):  # one after the other: the draft forgets the text before
        own = target.generate(prompt[None], COUNT)[0].tolist()
        for method, ahead in ((draft.from_text, 0), (draft.from_text, AHEAD), (propose, AHEAD)):
            tokens, passes, proposed, kept = draft.speculate(target, prompt.tolist(), COUNT, method, ahead)
            assert tokens == own
            assert 0 <= kept <= proposed <= ahead * passes
            assert COUNT <= passes + kept <= COUNT + AHEAD


def test_a_model_as_its_own_draft_is_always_right(target: draft.Rewindable, tiny_run: Path) -> None:
    propose = draft.from_model(draft.Rewindable(tiny_run / "onnx-dense", CPU, 1, "itself"))
    prompt = fresh.rng().integers(0, 500, 20).tolist()
    _, passes, proposed, kept = draft.speculate(target, prompt, COUNT, propose, AHEAD)
    assert (passes, proposed, kept) == (COUNT // (AHEAD + 1), COUNT * AHEAD // (AHEAD + 1), proposed)


def test_another_text_is_an_error(target: draft.Rewindable, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*given: object) -> tuple[list[int], int, int, int]:
        return [int(given[-1])], 1, 0, 0  # the text depends on how far ahead was looked

    monkeypatch.setattr(draft, "speculate", wrong)
    with pytest.raises(AssertionError, match="not the target's own"):
        draft.measure(target, {draft.NGRAM: None}, np.zeros((1, 4), np.int64), COUNT, [AHEAD])


def test_the_last_time_the_last_tokens_came_tells_what_follows() -> None:
    assert draft.from_text([1, 2, 3, 9, 1, 2, 4, 5, 1, 2], 2) == [4, 5]
    assert draft.from_text([1, 2, 3, 4], 2) == []
