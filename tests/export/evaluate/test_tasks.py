import re

import numpy as np
import pytest
import torch

from soco_export.evaluate.decoders.decoder import Decoder, TorchDecoder
from soco_export.evaluate.items import Item
from soco_export.evaluate.tasks import (
    TaskAnswers,
    answer_task,
    compare_answers,
    encode_pair,
    score_choices,
    summarise_answers,
)
from soco_train.errors import DataError
from tests.support import fresh
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
    return fresh.rng().normal(scale=2, size=(len(LETTERS), len(LETTERS)))


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
    decoder = TorchDecoder(ToyModel(int(fresh.rng().integers(2**31))))
    together, _ = score_choices(decoder, tokenizer, Item("a bad", (" lad", " melancholic dog", " cat"), 0))
    alone = [
        score_choices(decoder, tokenizer, Item("a bad", (c,), 0))[0][0] for c in (" lad", " melancholic dog", " cat")
    ]
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-4)


def test_answers_and_accuracy(table):
    items = [Item("go", (" up", " deeper and deeper"), 0), Item("a", (" b", " c", " d"), 2), Item("h", (" i", " j"), 1)]
    answers = answer_task(Bigrams(table), tokenizer, items, "toy")
    wanted = [np.argmax([log_likelihood(table, i.context, c) for c in i.choices]) for i in items]
    norm = [np.argmax([log_likelihood(table, i.context, c) / len(c[1:]) for c in i.choices]) for i in items]
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
    assert (comparison.flips, comparison.lost, comparison.gained) == (0.5, 0.25, 0.25)
    assert comparison.agreement == 0.25
    hopeless = TaskAnswers("t", (0,), (False,), (False,))
    assert compare_answers(hopeless, hopeless).recovery is None
    assert summarise_answers(hopeless).stderr is None


def test_a_sick_likelihood_is_an_error(table):
    table[3, 5] = np.nan
    with pytest.raises(DataError, match="likelihood of a choice is not finite"):
        score_choices(Bigrams(table), tokenizer, Item("c", ("e", "f"), 0))


class Tokens:
    """A tokenizer of words with their leading space, of three characters at most, which merges across borders."""

    def __init__(self, bos, eos=None):
        self.bos_token_id, self.eos_token_id = bos, eos
        self.bos_token = None if bos is None else "^"

    def __call__(self, text, add_special_tokens=True):
        pieces = re.findall(r" ?[^ ]{1,2}|\^| ", text)
        ids = [2 + sum(map(ord, piece)) % 21 for piece in pieces]
        return {"input_ids": [self.bos_token_id] * (add_special_tokens and self.bos_token_id is not None) + ids}


class Harness:
    """lm-evaluation-harness 0.4.13 as its rules say, in double: one continuation at a time, no padding."""

    def __init__(self, model, tokenizer, max_length):
        self.model, self.tokenizer, self.max_length = model, tokenizer, max_length

    def encode(self, text, **options):
        if self.tokenizer.bos_token and text.startswith(self.tokenizer.bos_token):
            options["add_special_tokens"] = False
        return self.tokenizer(text, **options)["input_ids"]

    def loglikelihood(self, context, continuation):
        if context == "":
            prefix = self.tokenizer.bos_token_id if self.tokenizer.bos_token_id is not None else 1
            tokens = self.encode(continuation, add_special_tokens=False)
            before, after = ([prefix], tokens) if tokens[0] != prefix else (tokens[:1], tokens[1:])
        else:
            spaces = len(context) - len(context.rstrip())
            if spaces:
                context, continuation = context[:-spaces], context[-spaces:] + continuation
            before = self.encode(context)
            after = self.encode(context + continuation)[len(before) :]
        ids = torch.tensor([(before + after)[-(self.max_length + 1) :][:-1]])
        with torch.no_grad():
            logits = self.model(ids, torch.ones_like(ids), torch.arange(ids.shape[1])[None]).logits.double()
        log_p = torch.log_softmax(logits[0, -len(after) :], -1)
        greedy = bool((log_p.argmax(-1) == torch.tensor(after)).all())
        return log_p[torch.arange(len(after)), torch.tensor(after)].sum().item(), greedy


def random_text(rng, most):
    words = ["".join(rng.choice(list("abcdeéü"), rng.integers(1, 6))) for _ in range(rng.integers(1, most))]
    return " ".join(words)


@pytest.mark.parametrize(("bos", "eos"), [(0, 1), (None, 1)])
def test_items_are_answered_as_the_harness_answers_them(bos, eos):
    rng = fresh.rng()
    model, tokenizer, longest = ToyModel(int(rng.integers(2**31))), Tokens(bos, eos), 24
    harness = Harness(model, tokenizer, longest)
    items = []
    for number in range(60):
        context = ["", "^" + random_text(rng, 9), random_text(rng, 9) + "  ", random_text(rng, 30)][number % 4]
        choices = tuple(" " + random_text(rng, 6) for _ in range(rng.integers(2, 5)))
        items.append(Item(context, choices, int(rng.integers(len(choices)))))
    answers = answer_task(TorchDecoder(model), tokenizer, items, "toy", context=longest)
    for index, item in enumerate(items):
        wanted = np.array([harness.loglikelihood(item.context, choice)[0] for choice in item.choices])
        found, greedy = score_choices(TorchDecoder(model), tokenizer, item, longest)
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
        assert list(greedy) == [harness.loglikelihood(item.context, choice)[1] for choice in item.choices]
        texts = [choice[1:] for choice in item.choices]
        assert answers.picked[index] == wanted.argmax()
        for right, size in (("right_norm", map(len, texts)), ("right_bytes", (len(t.encode()) for t in texts))):
            per_size = wanted / np.array(list(size))
            assert getattr(answers, right)[index] == (per_size.argmax() == item.label)


def test_a_context_too_long_loses_its_beginning_and_a_choice_too_long_is_refused():
    model, tokenizer = ToyModel(3), Tokens(0)
    short, long = " ab cd ef gh", "qu rs tu vw xy za ab cd ef gh"
    one, two = (score_choices(TorchDecoder(model), tokenizer, Item(c, (" ij",), 0), 4)[0] for c in (short, long))
    np.testing.assert_allclose(one, two, rtol=1e-5)
    with pytest.raises(DataError, match="a choice has 5 tokens, and the model has positions for 4"):
        score_choices(TorchDecoder(model), tokenizer, Item(short, (" ij kl mn op qr",), 0), 4)


def test_what_melts_into_the_context_is_still_scored():
    pairs = Tokens(None, 1)
    first, last = pairs("abcd")["input_ids"]
    assert encode_pair(pairs, "abc", "d") == ([first], [last])
    assert encode_pair(pairs, "a", "b") == ([1], pairs("ab")["input_ids"])
