"""Likelihood tasks from local jsonl files: multiple choice (ARC, PIQA) and last words (LAMBADA).

An item is a context and its choices; a model answers with the choice it finds likeliest. A file's format is known by
its fields; a new one is a decorated function. Beside accuracy, what matters for compression is how often an answer
changes against the dense model: accuracy can stand still while answers flip both ways (arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.decoder import Decoder, IntArray
from soco_export.evaluate.figures import TaskComparison, TaskFigures
from soco_export.evaluate.perplexity import token_losses
from soco_export.evaluate.settings import TaskSettings
from soco_train.data.reading import SHOWN, check_text, read_objects
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent


@dataclass(frozen=True)
class Item:
    """`choices` continue `context` word for word; `label` is the right one. One choice alone: predict it greedily."""

    context: str
    choices: tuple[str, ...]
    label: int


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
    return Item(row["context"], _listed(row["choices"]), int(row["label"]))


@item_format("context", "continuation")
def _last_word(row: Mapping[str, Any]) -> Item:
    return Item(row["context"], (" " + row["continuation"],), 0)


@item_format("question", "choices", "answerKey")
def _lettered(row: Mapping[str, Any]) -> Item:
    choices = tuple(" " + text for text in _listed(row["choices"]["text"]))
    return Item(f"Question: {row['question']}\nAnswer:", choices, row["choices"]["label"].index(row["answerKey"]))


@item_format("goal", "sol1", "sol2", "label")
def _piqa(row: Mapping[str, Any]) -> Item:
    return Item(f"Question: {row['goal']}\nAnswer:", (" " + row["sol1"], " " + row["sol2"]), int(row["label"]))


@item_format("query", "endings", "label")
def _endings(row: Mapping[str, Any]) -> Item:
    return Item(row["query"], tuple(" " + ending for ending in _listed(row["endings"])), int(row["label"]))


@item_format("premise", "choice1", "choice2", "question", "label")
def _copa(row: Mapping[str, Any]) -> Item:
    link = {"cause": " because", "effect": " so"}[row["question"]]
    choices = tuple(" " + row[key][0].lower() + row[key][1:] for key in ("choice1", "choice2"))
    return Item(row["premise"].strip().removesuffix(".") + link, choices, int(row["label"]))


@item_format("context", "question", "answerA", "answerB", "answerC", "label")
def _social(row: Mapping[str, Any]) -> Item:
    choices = tuple(" " + row[f"answer{letter}"] for letter in "ABC")
    return Item(f"Q: {row['context']} {row['question']}\nA:", choices, int(row["label"]) - 1)


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
            raise ValueError(f"its fields are {', '.join(sorted(map(repr, row))[:SHOWN]) or 'none'}")
        item = FORMATS[max(fits, key=len)](row)
        _check_item(item)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
        known = "; ".join(", ".join(sorted(fields)) for fields in FORMATS)
        raise DataError(
            f"no task item: {error}", fix=f"use one of these sets of fields: {known}", where=where
        ) from error
    for text in (item.context, *item.choices):
        check_text(text, where)
    return item


def _check_item(item: Item) -> None:
    """Raise ValueError for what is no item, although it has the fields of one."""
    if not isinstance(item.context, str) or not all(isinstance(choice, str) for choice in item.choices):
        raise ValueError("context and choices are not all text")
    if not all(choice.strip() for choice in item.choices):
        raise ValueError("a choice is blank")
    if not 0 <= item.label < len(item.choices):
        raise ValueError(f"label {item.label} of {len(item.choices)} choices")


def _listed(value: Any) -> tuple[str, ...]:
    """Return a list as it is; TypeError for a text, which would be taken apart into letters."""
    if not isinstance(value, list):
        raise TypeError(f"choices are a {type(value).__name__}, not a list")
    return tuple(value)


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers, item by item. `right` and `right_norm` (per byte) are what accuracy counts."""

    name: str
    picked: tuple[int, ...]
    right: tuple[bool, ...]
    right_norm: tuple[bool, ...]


def answer_task(
    decoder: Decoder, tokenizer: Any, items: Sequence[Item], name: str, notify: Notify = silent
) -> TaskAnswers:
    """Let `decoder` answer every item. An item with one choice is right if greedy decoding would give it."""
    picked, right, right_norm = [], [], []
    for index, item in enumerate(items):
        likelihoods, greedy = score_choices(decoder, tokenizer, item)
        sizes = np.array([len(choice.strip().encode()) or 1 for choice in item.choices])
        picked.append(_pick(likelihoods, greedy))
        right.append(picked[-1] == item.label)
        right_norm.append(_pick(likelihoods / sizes, greedy) == item.label)
        notify(Event(f"{name}: {decoder.name}", index + 1, len(items), {"acc": float(np.mean(right))}))
    return TaskAnswers(name, tuple(picked), tuple(right), tuple(right_norm))


def _pick(likelihoods: npt.NDArray[np.float64], greedy: npt.NDArray[np.bool_]) -> int:
    """Return the likeliest choice; a choice without rivals is picked only if it is what greedy decoding gives."""
    return int(likelihoods.argmax()) if len(likelihoods) > 1 or greedy[0] else -1


def score_choices(
    decoder: Decoder, tokenizer: Any, item: Item
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return log p(choice | context) per choice, [c], and whether each is the greedy continuation, [c].

    Raises DataError if a likelihood is not finite.
    """
    rows = [_tokens(tokenizer, item.context, choice) for choice in item.choices]
    width = max(len(whole) for whole, _ in rows)
    # Padded on the right: causal models do not see it, so no mask is needed where logits are read.
    ids = np.zeros((len(rows), width), dtype=np.int64)
    for row, (whole, _) in zip(ids, rows, strict=True):
        row[: len(whole)] = whole
    logits = decoder.logits(ids)
    likelihoods, greedy = np.empty(len(rows)), np.empty(len(rows), dtype=np.bool_)
    for index, (whole, start) in enumerate(rows):
        targets = np.asarray(whole[start:], dtype=np.int64)
        ahead = logits[index, start - 1 : len(whole) - 1]
        likelihoods[index] = -token_losses(ahead, targets).sum()
        greedy[index] = bool((ahead.argmax(-1) == targets).all())
    if not np.isfinite(likelihoods).all():
        raise DataError(
            f"the {decoder.name} model's likelihood of a choice is not finite",
            fix="check the weights for NaN and the dtype for overflow",
            where=repr(item.context[:60]),
        )
    return likelihoods, greedy


def _tokens(tokenizer: Any, context: str, choice: str) -> tuple[IntArray, int]:
    # Tokenizers merge spaces with the word that follows, so a context's trailing spaces belong to the choice.
    whole = tokenizer(context + choice)["input_ids"]
    start = max(1, min(len(tokenizer(context.rstrip())["input_ids"]), len(whole) - 1))
    return np.asarray(whole, dtype=np.int64), start


def summarise_answers(answers: TaskAnswers) -> TaskFigures:
    """Return accuracy and its standard error (None for one item)."""
    n, acc = len(answers.right), float(np.mean(answers.right))
    stderr = float(np.sqrt(acc * (1 - acc) / (n - 1))) if n > 1 else None
    return TaskFigures(n, acc, float(np.mean(answers.right_norm)), stderr)


def compare_answers(dense: TaskAnswers, compressed: TaskAnswers) -> TaskComparison:
    """Compare two models' answers to the same items; recovery is None where the dense model gets nothing right."""
    figures = summarise_answers(dense), summarise_answers(compressed)
    return TaskComparison(
        *figures,
        agreement=float(np.mean([a == b for a, b in zip(dense.picked, compressed.picked, strict=True)])),
        flips=float(np.mean([a != b for a, b in zip(dense.right, compressed.right, strict=True)])),
        recovery=figures[1].acc / figures[0].acc if figures[0].acc else None,
    )
