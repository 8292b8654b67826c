"""Likelihood tasks, answered item by item with the rules of lm-evaluation-harness (0.4.13), and two models' answers.

A model answers an item with the choice that it finds likeliest. Context and choice are tokenised as one text and parted
where the context's own tokens end; a text too long for the model loses its beginning; an empty context is the
tokenizer's first token (BOS, else EOS). Source: `_encode_pair` and `_loglikelihood_tokens` of the harness.
Beside accuracy, what matters for compression is how often an answer changes against the dense model: accuracy can stand
still while answers flip both ways (arXiv 2407.09141).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.decoders.decoder import Decoder
from soco_export.evaluate.figures import TaskComparison, TaskFigures
from soco_export.evaluate.items import Item
from soco_export.evaluate.paired import chance_corrected, difference_interval, ratio_interval
from soco_export.evaluate.perplexity import token_losses
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent

DELIMITER = " "  # between a prompt and a choice; no part of the choice's length


@dataclass(frozen=True)
class TaskAnswers:
    """One model's answers, item by item. `right*` is what accuracy counts: plain, per character, per byte."""

    name: str
    picked: tuple[int, ...]
    right: tuple[bool, ...]
    right_norm: tuple[bool, ...]
    right_bytes: tuple[bool, ...] = ()


def answer_task(
    decoder: Decoder,
    tokenizer: Any,
    items: Sequence[Item],
    name: str,
    notify: Notify = silent,
    context: int | None = None,
) -> TaskAnswers:
    """Let `decoder` answer every item. An item with one choice is right if greedy decoding would give it.

    context: the longest text that the model reads, in tokens; None: any.
    """
    answers = []
    for index, item in enumerate(items):
        likelihoods, greedy = score_choices(decoder, tokenizer, item, context)
        texts = [choice.removeprefix(DELIMITER) for choice in item.choices]
        sizes = ([1.0] * len(texts), [len(text) for text in texts], [len(text.encode()) for text in texts])
        answers.append([_pick(likelihoods / np.array(size), greedy) for size in sizes])
        right = [picks[0] == item.label for picks, item in zip(answers, items, strict=False)]
        notify(Event(f"{name}: {decoder.name}", index + 1, len(items), {"acc": float(np.mean(right))}))
    columns = zip(*answers, strict=True)
    rights = [tuple(pick == item.label for pick, item in zip(column, items, strict=True)) for column in columns]
    return TaskAnswers(name, tuple(picks[0] for picks in answers), *rights)


def _pick(likelihoods: npt.NDArray[np.float64], greedy: npt.NDArray[np.bool_]) -> int:
    """Return the likeliest choice; a choice without rivals is picked only if it is what greedy decoding gives."""
    return int(likelihoods.argmax()) if len(likelihoods) > 1 or greedy[0] else -1


def score_choices(
    decoder: Decoder, tokenizer: Any, item: Item, context: int | None = None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return log p(choice | context) per choice, [c], and whether each is the greedy continuation, [c].

    Raises DataError if a likelihood is not finite, or if a choice alone is longer than the model's `context`.
    """
    pairs = [_shorten(*encode_pair(tokenizer, *pair), context, item) for pair in item.pairs]
    rows = [(before + after)[:-1] for before, after in pairs]
    # Padded on the right: causal models do not see it, so no mask is needed where logits are read.
    ids = np.zeros((len(rows), max(map(len, rows))), dtype=np.int64)
    for row, tokens in zip(ids, rows, strict=True):
        row[: len(tokens)] = tokens
    logits = decoder.logits(ids)
    likelihoods, greedy = np.empty(len(rows)), np.empty(len(rows), dtype=np.bool_)
    for index, (before, after) in enumerate(pairs):
        targets = np.asarray(after, dtype=np.int64)
        ahead = logits[index, len(before) - 1 : len(before) - 1 + len(after)]
        likelihoods[index] = -token_losses(ahead, targets).sum()
        greedy[index] = bool((ahead.argmax(-1) == targets).all())
    if not np.isfinite(likelihoods).all():
        raise DataError(
            f"the {decoder.name} model's likelihood of a choice is not finite",
            fix="check the weights for NaN and the dtype for overflow",
            where=repr(item.context[:60]),
        )
    return likelihoods, greedy


def encode_pair(tokenizer: Any, context: str, choice: str) -> tuple[list[int], list[int]]:
    """Return the tokens of context and choice, neither empty, parted where the context's own tokens end.

    The context's trailing spaces belong to the choice, with whose first word tokenizers merge them. Special tokens are
    added as the tokenizer adds them by itself, but not to a text that begins with BOS or has nothing before it.
    """
    if not context:
        first, after = first_token(tokenizer), _encode(tokenizer, choice, add_special_tokens=False)
        return ([first], after) if after[:1] != [first] or len(after) < 2 else (after[:1], after[1:])
    whole = _encode(tokenizer, context + choice)
    if len(whole) < 2:
        return [first_token(tokenizer)], whole
    # A choice that melts into the context's last token is still scored: at least one token is its own.
    start = max(1, min(len(_encode(tokenizer, context.rstrip())), len(whole) - 1))
    return whole[:start], whole[start:]


def first_token(tokenizer: Any) -> int:
    """Return the token that stands before an empty context: BOS, or EOS where there is none (0 without either)."""
    found = (getattr(tokenizer, name, None) for name in ("bos_token_id", "eos_token_id"))
    return next((token for token in found if token is not None), 0)


def _encode(tokenizer: Any, text: str, **options: Any) -> list[int]:
    if (bos := getattr(tokenizer, "bos_token", None)) and text.startswith(bos):
        options["add_special_tokens"] = False
    return list(tokenizer(text, **options)["input_ids"])


def _shorten(before: list[int], after: list[int], context: int | None, item: Item) -> tuple[list[int], list[int]]:
    """Cut the beginning off what is longer than the model's context; the last token is predicted and not read."""
    if context is None or len(before) + len(after) <= context + 1:
        return before, after
    if len(after) > context:
        raise DataError(
            f"a choice has {len(after)} tokens, and the model has positions for {context}",
            fix="leave the item out",
            where=repr(item.context[:60]),
        )
    return before[len(after) - context - 1 :], after


def summarise_answers(answers: TaskAnswers) -> TaskFigures:
    """Return accuracy and its standard error (None for one item)."""
    n, acc = len(answers.right), float(np.mean(answers.right))
    stderr = float(np.sqrt(acc * (1 - acc) / (n - 1))) if n > 1 else None
    acc_bytes = float(np.mean(answers.right_bytes)) if answers.right_bytes else None
    return TaskFigures(n, acc, float(np.mean(answers.right_norm)), stderr, acc_bytes)


def compare_answers(dense: TaskAnswers, compressed: TaskAnswers) -> TaskComparison:
    """Compare two models' answers to the same items; recovery is None where the dense model gets nothing right."""
    figures = summarise_answers(dense), summarise_answers(compressed)
    before, after = np.array(dense.right), np.array(compressed.right)
    return TaskComparison(
        *figures,
        agreement=float(np.mean([a == b for a, b in zip(dense.picked, compressed.picked, strict=True)])),
        flips=float(np.mean(before != after)),
        recovery=figures[1].acc / figures[0].acc if figures[0].acc else None,
        lost=float(np.mean(before & ~after)),
        gained=float(np.mean(~before & after)),
        kappa=chance_corrected(dense.picked, compressed.picked),
        difference=figures[1].acc - figures[0].acc,
        difference_interval=difference_interval(before, after),
        recovery_interval=ratio_interval(before, after),
    )
