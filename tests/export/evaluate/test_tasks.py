import json

import numpy as np
import pytest
import torch

from soco_export.evaluate.decoder import Decoder, TorchDecoder
from soco_export.evaluate.settings import TaskSettings
from soco_export.evaluate.tasks import (
    Item,
    TaskAnswers,
    answer_task,
    compare_answers,
    load_items,
    score_choices,
    summarise_answers,
)
from soco_train.errors import DataError, RecipeError
from tests.support.graphs import ToyModel

LETTERS = " abcdefghijklmnopqrstuv"  # 23 characters: one id each, as many as the toy model has


def tokenizer(text):
    return {"input_ids": [LETTERS.index(letter) for letter in text]}


class Bigrams(Decoder):
    """log p(next | last) from a table; knows nothing else."""

    def __init__(self, table, name="dense"):
        super().__init__(name)
        self.table = table.astype(np.float32)

    def _forward(self, ids, mask, positions, past):
        return self.table[ids], None


@pytest.fixture
def table():
    return np.random.default_rng().normal(scale=2, size=(len(LETTERS), len(LETTERS)))


def log_likelihood(table, context, choice):
    log_p = torch.log_softmax(torch.from_numpy(table), -1).numpy()
    ids = tokenizer(context + choice)["input_ids"]
    start = len(context.rstrip())
    return sum(log_p[ids[i - 1], ids[i]] for i in range(start, len(ids)))


def test_likelihoods_are_those_of_the_choice_alone(table):
    item = Item("the dog", (" bit a man", " slept", " ran"), 0)
    found, _ = score_choices(Bigrams(table), tokenizer, item)
    np.testing.assert_allclose(found, [log_likelihood(table, item.context, c) for c in item.choices], rtol=1e-5)


def test_a_contexts_trailing_space_is_scored_with_the_choice(table):
    found, _ = score_choices(Bigrams(table), tokenizer, Item("the dog ", ("bit", "slept"), 0))
    joined, _ = score_choices(Bigrams(table), tokenizer, Item("the dog", (" bit", " slept"), 0))
    np.testing.assert_allclose(found, joined)


def test_padding_to_the_longest_choice_changes_no_likelihood():
    decoder = TorchDecoder(ToyModel(int(np.random.default_rng().integers(2**31))))
    together, _ = score_choices(decoder, tokenizer, Item("a bad", (" lad", " melancholic dog", " cat"), 0))
    alone = [
        score_choices(decoder, tokenizer, Item("a bad", (c,), 0))[0][0] for c in (" lad", " melancholic dog", " cat")
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_answers_and_accuracy(table):
    items = [Item("go", (" up", " deeper and deeper"), 0), Item("a", (" b", " c", " d"), 2), Item("h", (" i", " j"), 1)]
    answers = answer_task(Bigrams(table), tokenizer, items, "toy")
    wanted = [np.argmax([log_likelihood(table, i.context, c) for c in i.choices]) for i in items]
    norm = [np.argmax([log_likelihood(table, i.context, c) / len(c.strip()) for c in i.choices]) for i in items]
    assert list(answers.picked) == wanted
    assert list(answers.right) == [pick == item.label for pick, item in zip(wanted, items, strict=True)]
    assert list(answers.right_norm) == [pick == item.label for pick, item in zip(norm, items, strict=True)]
    figures = summarise_answers(answers)
    assert figures.items == 3
    assert figures.acc == pytest.approx(np.mean(answers.right))
    assert figures.stderr == pytest.approx(np.std(answers.right, ddof=1) / np.sqrt(3))


def test_a_single_choice_is_right_exactly_if_greedy_decoding_gives_it(table):
    table[LETTERS.index("k"), LETTERS.index(" ")] = 99
    table[LETTERS.index(" "), LETTERS.index("a")] = 99
    answers = answer_task(Bigrams(table), tokenizer, [Item("k", (" a",), 0), Item("k", (" b",), 0)], "words")
    assert answers.right == (True, False)
    assert answers.right_norm == (True, False)


def test_flips_count_changes_both_ways_though_accuracy_stands_still():
    dense = TaskAnswers("t", (0, 1, 2, 0), (True, True, False, False), (True,) * 4)
    compressed = TaskAnswers("t", (1, 1, 0, 3), (False, True, True, False), (True,) * 4)
    comparison = compare_answers(dense, compressed)
    assert comparison.recovery == 1.0
    assert comparison.flips == 0.5
    assert comparison.agreement == 0.25
    hopeless = TaskAnswers("t", (0,), (False,), (False,))
    assert compare_answers(hopeless, hopeless).recovery is None
    assert summarise_answers(hopeless).stderr is None


def test_a_sick_likelihood_is_an_error(table):
    table[3, 5] = np.nan
    with pytest.raises(DataError, match="likelihood of a choice is not finite"):
        score_choices(Bigrams(table), tokenizer, Item("c", ("e", "f"), 0))


ROWS = [
    ({"context": "A", "choices": [" b", " c"], "label": 1}, Item("A", (" b", " c"), 1)),
    ({"context": "It was a", "continuation": "dog", "x": 1}, Item("It was a", (" dog",), 0)),
    (
        {"id": "1", "question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
        Item("Question: Why?\nAnswer:", (" so", " no"), 1),
    ),
    ({"goal": "win", "sol1": "run", "sol2": "sit", "label": 0}, Item("Question: win\nAnswer:", (" run", " sit"), 0)),
    ({"ind": 3, "query": "He", "endings": ["ran", "sat"], "label": 1}, Item("He", (" ran", " sat"), 1)),
    (
        {"premise": "It broke.", "choice1": "It fell.", "choice2": "I slept.", "question": "cause", "label": 0},
        Item("It broke because", (" it fell.", " i slept."), 0),
    ),
    (
        {"context": "C.", "question": "Q?", "answerA": "x", "answerB": "y", "answerC": "z", "label": "3"},
        Item("Q: C. Q?\nA:", (" x", " y", " z"), 2),
    ),
]


def test_formats_are_known_by_their_fields(tmp_path):
    for row, wanted in ROWS:
        path = tmp_path / "task.jsonl"
        path.write_text(json.dumps(row) + "\n\n" + json.dumps(row) + "\n", encoding="utf-8")
        assert load_items(TaskSettings(path=path)) == [wanted, wanted]
        assert load_items(TaskSettings(path=path, limit=1)) == [wanted]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{"context": "a", "choices": ["b"], "label": 1}', "1"),
        ('{"context": "a", "continuation": "b"}\nnonsense', "2"),
        ('{"unknown": 1}', "1"),
        ("[1]", "1"),
        ('{"context": 3, "choices": null, "label": 0}', "1"),
        ('{"context": "a", "choices": [" b", ""], "label": 0}', "1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, text, where):
    path = tmp_path / "task.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"no task item|is no JSON|not an object") as caught:
        load_items(TaskSettings(path=path))
    assert caught.value.where == f"{path}:{where}"


def test_files_that_are_absent_empty_or_not_utf8_are_refused(tmp_path):
    path = tmp_path / "task.jsonl"
    with pytest.raises(RecipeError, match="cannot read"):
        load_items(TaskSettings(path=path))
    path.write_text("\n", encoding="utf-8")
    with pytest.raises(DataError, match="no items"):
        load_items(TaskSettings(path=path))
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(DataError, match="UTF-16"):
        load_items(TaskSettings(path=path))
