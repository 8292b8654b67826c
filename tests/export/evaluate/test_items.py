import json
import random

import pytest

from soco_export.evaluate.arithmetic import arithmetic
from soco_export.evaluate.items import FORMATS, Item, load_items
from soco_export.evaluate.settings import TaskSettings
from soco_train.errors import DataError, RecipeError

ROWS = [
    ({"context": "A", "choices": [" b", " c"], "label": 1}, Item("A", (" b", " c"), 1)),
    ({"context": "It was a", "continuation": "dog", "x": 1}, Item("It was a", (" dog",), 0)),
    (
        {"id": "1", "question": "Why?", "choices": {"text": ["so", "no"], "label": ["A", "B"]}, "answerKey": "B"},
        Item("Question: Why?\nAnswer:", (" so", " no"), 1),
    ),
    ({"goal": "win", "sol1": "run", "sol2": "sit", "label": 0}, Item("Question: win\nAnswer:", (" run", " sit"), 0)),
    (
        {"question": " 1 + 1? ", "choices": ["2", "3"], "answer": 0, "subject": "high_school_mathematics"},
        Item(
            "The following are multiple choice questions (with answers) about high school mathematics.\n\n"
            "1 + 1?\nA. 2\nB. 3\nAnswer:",
            (" A", " B"),
            0,
        ),
    ),
    (
        {
            "question": "Where? ",
            "question_concept": "x",
            "answerKey": "B",
            "choices": {"label": ["A", "B"], "text": ["here", "there"]},
        },
        Item("Question: Where?\nA. here\nB. there\nAnswer:", (" A", " B"), 1),
    ),
    (
        {"question_stem": "The sun is", "choices": {"text": ["hot", "wet"], "label": ["A", "B"]}, "answerKey": " A"},
        Item("The sun is", (" hot", " wet"), 0),
    ),
    (
        {
            "support": " It is.",
            "question": "Q?",
            "correct_answer": "d",
            "distractor1": "a",
            "distractor2": "b",
            "distractor3": "c",
        },
        Item("It is.\nQuestion: Q?\nAnswer:", (" a", " b", " c", " d"), 3),
    ),
    ({"passage": "P.", "question": "is it", "label": 1}, Item("P.\nQuestion: is it?\nAnswer:", (" no", " yes"), 1)),
    (
        {"passage": "P.", "question": "is it", "answer": False, "title": "T"},
        Item("P.\nQuestion: is it?\nAnswer:", (" no", " yes"), 0),
    ),
    (
        {"sentence": "Ann met Eve, so _ went home.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        Item("Ann met Eve, so Ann", (" went home.",) * 2, 1, ("Ann met Eve, so Ann", "Ann met Eve, so Eve")),
    ),
    ({"sentence_good": "He is.", "sentence_bad": "He are."}, Item("", (" He is.", " He are."), 0)),
    (
        {
            "activity_label": "Run",
            "ctx_a": "A [title] b.",
            "ctx_b": "he DID",
            "ctx": "",
            "label": "1",
            "endings": ["a [step] b", "c"],
        },
        Item("Run: A. b. He did", (" a b", " c"), 1),
    ),
    ({"text": "It was a dog"}, Item("It was a", (" dog",), 0)),
    ({"ind": 3, "query": "He", "endings": ["ran", "sat"], "label": 1}, Item("He", (" ran", " sat"), 1)),
    (
        {"premise": "It broke.", "choice1": "It fell.", "choice2": "I slept.", "question": "cause", "label": 0},
        Item("It broke because", ("  it fell.", "  i slept."), 0),
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
        ('{"text": "two words", "label": 1}', "1"),
        ('{"text": "one"}', "1"),
        ('{"sentence": "no gap", "option1": "a", "option2": "b", "answer": "1"}', "1"),
        ('{"question_stem": "a", "choices": {"text": ["b"], "label": ["A"]}, "answerKey": "B"}', "1"),
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


@pytest.mark.parametrize("value", [None, 1.5, -0.5, [], ["a", None], [["a"]], {}, {"text": "ab", "label": "AB"}])
def test_a_field_of_another_kind_is_refused(tmp_path, value):
    """A null or a list would become a word of a prompt, and half a label a whole one."""
    path = tmp_path / "task.jsonl"
    fields = [max((fields for fields in FORMATS if fields <= row.keys()), key=len) for row, _ in ROWS]
    for row, field in ((row, field) for (row, _), own in zip(ROWS, fields, strict=True) for field in own):
        path.write_text(json.dumps({**row, field: value}), encoding="utf-8")
        with pytest.raises(DataError, match="no task item"):
            load_items(TaskSettings(path=path))


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"choices": {"text": ["a", "b"], "label": ["A", "A"]}}, "one label each"),
        ({"choices": {"text": ["a", "b"], "label": ["A"]}}, "one label each"),
        ({"choices": ["a", "b"]}, "not a table"),
        ({"answerKey": "C" * 9999}, "one label each"),
    ],
)
def test_labels_that_are_not_one_for_each_choice_are_refused(tmp_path, changed, words):
    row = {"question": "Q?", "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"} | changed
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        load_items(TaskSettings(path=path))
    assert len(caught.value.message) < 300


def test_more_choices_than_letters_are_refused(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text(json.dumps({"question": "Q?", "choices": ["a"] * 11, "answer": 0}), encoding="utf-8")
    with pytest.raises(DataError, match="letters"):
        load_items(TaskSettings(path=path))


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


def test_what_is_no_item_is_told_what_it_has_and_what_it_lacks(tmp_path):
    path = tmp_path / "task.jsonl"
    path.write_text('{"goal": "win", "sol1": "run", "label": 0}', encoding="utf-8")
    with pytest.raises(
        DataError, match=r"its fields are 'goal', 'label', 'sol1'; sol2 would make it an item"
    ) as caught:
        load_items(TaskSettings(path=path))
    assert "goal, label, sol1, sol2" in caught.value.fix


def test_arithmetic_is_right_and_its_wrong_choices_are_not(tmp_path):
    path = tmp_path / "arithmetic.jsonl"
    made = list(arithmetic(200, seed=random.randrange(2**32)))
    path.write_text("".join(json.dumps(item) + "\n" for item in made), encoding="utf-8")
    items = load_items(TaskSettings(path=path))
    assert len(items) == 200
    for item in items:
        one, sign, two, _ = item.context.splitlines()[-1].split()
        value = {"+": int(one) + int(two), "-": int(one) - int(two), "*": int(one) * int(two)}[sign]
        assert [int(choice) == value for choice in item.choices].index(True) == item.label
        assert len(set(item.choices)) == 4
        assert min(int(choice) for choice in item.choices) >= 0
    assert {item.label for item in items} == {0, 1, 2, 3}
    assert {item.context.splitlines()[-1].split()[1] for item in items} == {"+", "-", "*"}
    assert list(arithmetic(9, seed=3)) == list(arithmetic(9, seed=3)) != list(arithmetic(9, seed=4))
