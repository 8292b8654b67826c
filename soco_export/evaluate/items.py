"""Items of likelihood tasks, read from local jsonl files with the prompts of lm-evaluation-harness (0.4.13).

An item is a context and its choices. A file's format is known by its fields, which are those of the Hugging Face data
sets; a new one is a decorated function. Prompts and order of choices are those of the harness's zero-shot tasks, its
oddities too (two spaces before a COPA choice), so that the numbers are its numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from soco_export.evaluate.settings import TaskSettings
from soco_train.data.reading import SHOWN, check_text, read_objects
from soco_train.errors import DataError

LETTERS = "ABCDEFGHIJ"
# fields that are no text: lists of choices, and numbers of the right one (BoolQ's is true or false)
_LISTS = frozenset({"choices", "endings"})
_NUMBERS = frozenset({"label", "answer"})


@dataclass(frozen=True)
class Item:
    """`choices` continue `context` word for word; `label` is the right one. One choice alone: predict it greedily.

    `contexts`: one for each choice, in place of `context`, where the choices differ in what comes first (Winogrande).
    """

    context: str
    choices: tuple[str, ...]
    label: int
    contexts: tuple[str, ...] = ()

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The (context, continuation) of each choice."""
        return list(zip(self.contexts or (self.context,) * len(self.choices), self.choices, strict=True))


Reader = Callable[[Mapping[str, Any]], Item]
FORMATS: dict[frozenset[str], Reader] = {}


def item_format(*fields: str) -> Callable[[Reader], Reader]:
    """Register a reader for jsonl objects that have all of `fields`; the most specific match wins."""

    def register(reader: Reader) -> Reader:
        FORMATS[frozenset(fields)] = reader
        return reader

    return register


@item_format("context", "choices", "label")
def _generic(row: Mapping[str, Any]) -> Item:
    return Item(row["context"], _listed(row, "choices"), int(row["label"]))


@item_format("context", "continuation")
def _last_word(row: Mapping[str, Any]) -> Item:
    return Item(row["context"], (" " + row["continuation"],), 0)


@item_format("text")
def _lambada(row: Mapping[str, Any]) -> Item:
    context, space, word = row["text"].rpartition(" ")
    if len(row) > 1 or not space:
        raise ValueError("text alone is a LAMBADA item, of two words or more, and has no other field beside it")
    return Item(context, (" " + word,), 0)


@item_format("question", "choices", "answerKey")
def _arc(row: Mapping[str, Any]) -> Item:
    return Item(f"Question: {row['question']}\nAnswer:", _spaced(_tabled(row)), _keyed(row))


@item_format("question", "choices", "answerKey", "question_concept")
def _commonsense_qa(row: Mapping[str, Any]) -> Item:
    texts = _tabled(row)
    return Item(_lettered(f"Question: {row['question'].strip()}", texts), _spaced(LETTERS[: len(texts)]), _keyed(row))


@item_format("question", "choices", "answer")
def _mmlu(row: Mapping[str, Any]) -> Item:
    texts, subject = _listed(row, "choices"), row.get("subject")
    about = "" if subject is None else f" about {_text(row, 'subject').replace('_', ' ')}"
    title = "" if subject is None else f"The following are multiple choice questions (with answers){about}.\n\n"
    return Item(title + _lettered(row["question"].strip(), texts), _spaced(LETTERS[: len(texts)]), int(row["answer"]))


@item_format("question_stem", "choices", "answerKey")
def _openbookqa(row: Mapping[str, Any]) -> Item:
    return Item(row["question_stem"], _spaced(_tabled(row)), _keyed(row))


@item_format("support", "question", "correct_answer", "distractor1", "distractor2", "distractor3")
def _sciq(row: Mapping[str, Any]) -> Item:
    choices = _spaced(row[key] for key in ("distractor1", "distractor2", "distractor3", "correct_answer"))
    return Item(f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:", choices, 3)


@item_format("passage", "question", "label")
def _boolq(row: Mapping[str, Any]) -> Item:
    return Item(f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", (" no", " yes"), int(row["label"]))


@item_format("passage", "question", "answer")
def _boolq_google(row: Mapping[str, Any]) -> Item:
    return _boolq({**row, "label": row["answer"]})


@item_format("goal", "sol1", "sol2", "label")
def _piqa(row: Mapping[str, Any]) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", _spaced((row["sol1"], row["sol2"])), int(row["label"]))


@item_format("query", "endings", "label")
def _endings(row: Mapping[str, Any]) -> Item:
    return Item(row["query"], _spaced(_listed(row, "endings")), int(row["label"]))


@item_format("activity_label", "ctx_a", "ctx_b", "endings", "label")
def _hellaswag(row: Mapping[str, Any]) -> Item:
    query = _clean(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    return Item(query, _spaced(_clean(ending) for ending in _listed(row, "endings")), int(row["label"]))


@item_format("sentence", "option1", "option2", "answer")
def _winogrande(row: Mapping[str, Any]) -> Item:
    before, gap, after = row["sentence"].partition("_")
    if not gap:
        raise ValueError("the sentence has no _ to fill")
    contexts = tuple(before + row[key] for key in ("option1", "option2"))
    return Item(contexts[0], _spaced([after.strip()] * 2), int(row["answer"]) - 1, contexts)


@item_format("sentence_good", "sentence_bad")
def _blimp(row: Mapping[str, Any]) -> Item:
    return Item("", _spaced((row["sentence_good"], row["sentence_bad"])), 0)


@item_format("premise", "choice1", "choice2", "question", "label")
def _copa(row: Mapping[str, Any]) -> Item:
    link = {"cause": "because", "effect": "therefore"}.get(row["question"])
    if link is None:
        raise ValueError("question is neither cause nor effect")
    choices = tuple(f"  {row[key][0].lower()}{row[key][1:]}" for key in ("choice1", "choice2"))
    return Item(f"{row['premise'].strip()[:-1]} {link}", choices, int(row["label"]))


@item_format("context", "question", "answerA", "answerB", "answerC", "label")
def _social(row: Mapping[str, Any]) -> Item:
    choices = _spaced(row[f"answer{letter}"] for letter in "ABC")
    return Item(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


def _clean(text: str) -> str:
    """Take WikiHow's marks out of a HellaSwag text, as the harness does."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _lettered(question: str, texts: tuple[str, ...]) -> str:
    if len(texts) > len(LETTERS):
        raise ValueError(f"{len(texts)} choices, and there are letters for {len(LETTERS)}")
    options = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=False))
    return f"{question}\n{options}Answer:"


def _spaced(texts: Any) -> tuple[str, ...]:
    return tuple(" " + text for text in texts)


def _keyed(row: Mapping[str, Any]) -> int:
    labels, key = _listed(row["choices"], "label"), row["answerKey"].strip()
    if len(set(labels)) != len(_tabled(row)) or key not in labels:
        raise ValueError("choices do not have one label each, of which answerKey is one")
    return labels.index(key)


def load_items(settings: TaskSettings) -> list[Item]:
    """Read a file of JSON lines, as many items as are wanted; DataError, with the line, for what no format reads."""
    rows = islice(read_objects(settings.path, "item"), settings.limit)
    items = [_read_item(row, where) for where, row in rows]
    if not items:
        raise DataError("the task has no items", fix="give a jsonl file with one item a line", where=str(settings.path))
    return items


def _read_item(row: Mapping[str, Any], where: str) -> Item:
    fits = [fields for fields in FORMATS if fields <= row.keys()]
    try:
        if not fits:
            raise ValueError(f"its fields are {_names(row)}; {_nearest(row)}")
        fields = max(fits, key=len)
        _check_fields(row, fields)
        item = FORMATS[fields](row)
        _check_item(item)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        known = "; ".join(", ".join(sorted(fields)) for fields in FORMATS)
        raise DataError(
            f"no task item: {error}" if not fits else f"no task item: {error} (its fields are {_names(row)})",
            fix=f"use one of these sets of fields: {known}",
            where=where,
        ) from error
    for text in (item.context, *item.contexts, *item.choices):
        check_text(text, where)
    return item


def _names(row: Mapping[str, Any]) -> str:
    return ", ".join(repr(name)[:60] for name in sorted(row)[:SHOWN]) or "none"


def _nearest(row: Mapping[str, Any]) -> str:
    """Say which fields are missing of the format that the row has most of."""
    nearest = max(FORMATS, key=lambda fields: (len(fields & row.keys()) / len(fields), -len(fields)))
    return f"{', '.join(sorted(nearest - row.keys()))} would make it an item"


def _check_item(item: Item) -> None:
    """Raise ValueError for what is no item, although it has the fields of one."""
    texts = (item.context, *item.contexts, *item.choices)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("context and choices are not all text")
    if not all(choice.strip() for choice in item.choices):
        raise ValueError("a choice is blank")
    if not 0 <= item.label < len(item.choices):
        raise ValueError(f"label {item.label} of {len(item.choices)} choices")


def _check_fields(row: Mapping[str, Any], fields: frozenset[str]) -> None:
    """Raise TypeError for a field of another kind than its name says: `null` would become the word None in a prompt."""
    for field in sorted(fields - _LISTS):
        if field not in _NUMBERS:
            _text(row, field)
        elif not (isinstance(row[field], bool) or str(row[field]).isdecimal()):
            raise TypeError(f"{field} is {_shown(row[field])}, not the number of a choice")


def _text(row: Mapping[str, Any], field: str) -> str:
    if not isinstance(row[field], str):
        raise TypeError(f"{field} is {_shown(row[field])}, not text")
    return str(row[field])


def _listed(row: Mapping[str, Any], field: str) -> tuple[str, ...]:
    """Return the texts in a list; TypeError for anything else: a text would be taken apart into letters."""
    found = row.get(field) if isinstance(row, dict) else None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TypeError(f"{field} is {_shown(found)}, not a list of texts")
    return tuple(found)


def _tabled(row: Mapping[str, Any]) -> tuple[str, ...]:
    if not isinstance(row["choices"], dict):
        raise TypeError(f"choices is {_shown(row['choices'])}, not a table of text and label")
    return _listed(row["choices"], "text")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]
