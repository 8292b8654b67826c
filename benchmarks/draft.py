"""Speculative decoding on a CPU: is a compressed model worth having as a draft for the model it came from?

    python -m benchmarks.draft target=onnx-dense 0.6=onnx int4=onnx-dense-int4 --hf HF --evaluate TEXT --out OUT.json

The first folder is the target, the others are drafts for it. A draft proposes `--ahead` tokens, one pass of the target
over them keeps those that it would have chosen and adds one of its own, so that the text is the target's greedy text,
token for token; where it is not, this stops with an error. `n-gram` proposes what followed the last two tokens when
they came before, and needs no model. All methods take turns at the same prompts;
the ratio is the target alone over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime as ort

from benchmarks.bits.models import tokenizer_of
from soco_export.bench.machine import describe_machine
from soco_export.evaluate.decoders.decoder import IntArray
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.settings import CPU
from soco_export.files.atomic import write_atomic
from soco_train.data.corpus import load_blocks
from soco_train.settings.data import DataSettings

Propose = Callable[[list[int], int], list[int]]
ALONE, NGRAM = "alone", "n-gram"
GRAM = 2  # tokens that must have come before


class Rewindable(OnnxDecoder):
    """A decoder that can forget the end of what it has read."""

    def rewind(self, length: int) -> None:
        """Keep the cache of the first `length` tokens."""
        if length == 0:
            self.release()
        elif self._mask is not None and length < self._mask.shape[1]:
            self._mask = self._mask[:, :length]
            self._past = {
                name: ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :length]))
                for name, value in self._past.items()
            }

    @property
    def length(self) -> int:
        """How many tokens are in the cache."""
        return 0 if self._mask is None else self._mask.shape[1]


@dataclass(frozen=True)
class Row:
    """One method: tokens/s, tokens that a pass of the target yields, share of the proposals kept, ratio to `alone`."""

    name: str
    ahead: int
    tokens_per_second: float
    tokens_per_pass: float
    accepted: float
    speedup: float
    low: float
    high: float


def from_model(draft: Rewindable) -> Propose:
    """Return a function that lets a model go on greedily from a text, reading only what it has not read."""
    read: list[int] = []

    def propose(text: list[int], count: int) -> list[int]:
        pairs = enumerate(zip(read, text, strict=False))
        same = next((i for i, (old, new) in pairs if old != new), min(len(read), len(text)))
        draft.rewind(min(same, len(text) - 1))
        logits = draft.step(np.array([text[draft.length :]]))
        found = [int(logits[0, -1].argmax())]
        while len(found) < count:
            found.append(int(draft.step(np.array([found[-1:]]))[0, -1].argmax()))
        read[:] = [*text, *found[:-1]]
        return found

    return propose


def from_text(text: list[int], count: int) -> list[int]:
    """Return what followed the last tokens the last time they came; nothing if they never did."""
    end = text[-GRAM:]
    for start in range(len(text) - GRAM - 1, -1, -1):
        if text[start : start + GRAM] == end:
            return text[start + GRAM : start + GRAM + count]
    return []


def speculate(
    target: Rewindable, prompt: Sequence[int], count: int, propose: Propose, ahead: int
) -> tuple[list[int], int, int, int]:
    """Return (tokens, passes of the target, proposals, proposals kept) for `count` tokens behind a prompt."""
    text, passes, proposed, kept = list(prompt), 0, 0, 0
    target.prefill(np.array([text[:-1]]))
    while len(text) < len(prompt) + count:
        guess = propose(text, ahead) if ahead else []
        logits = target.step(np.array([text[target.length :] + guess]))[0]
        chosen = [int(token) for token in logits[-len(guess) - 1 :].argmax(-1)]
        good = next((i for i, token in enumerate(guess) if token != chosen[i]), len(guess))
        text += [*guess[:good], chosen[good]]
        target.rewind(len(text) - 1)
        passes, proposed, kept = passes + 1, proposed + len(guess), kept + good
    return text[len(prompt) : len(prompt) + count], passes, proposed, kept


def measure(
    target: Rewindable, drafts: dict[str, Propose | None], prompts: IntArray, count: int, ahead: Sequence[int]
) -> list[Row]:
    """Time every method on every prompt, in turns; a method whose text is not the target's own is an error."""
    methods = [(ALONE, 0)] + [(name, length) for name in drafts for length in ahead]
    seconds: dict[tuple[str, int], list[float]] = {method: [] for method in methods}
    totals = {method: np.zeros(3, np.int64) for method in methods}
    for number, prompt in enumerate(prompts.tolist()):
        texts = []
        for name, length in (*methods[number % len(methods) :], *methods[: number % len(methods)]):
            started = time.perf_counter()
            tokens, *counts = speculate(target, prompt, count, drafts.get(name) or from_text, length)
            seconds[name, length].append(time.perf_counter() - started)
            totals[name, length] += counts
            texts.append(tokens)
        if any(text != texts[0] for text in texts):
            raise AssertionError(f"prompt {number}: a speculated text is not the target's own")
    alone = seconds[ALONE, 0]
    rows = []
    for (name, length), times in seconds.items():
        ratios = sorted(one / other for one, other in zip(alone, times, strict=True))
        passes, proposed, kept = (int(total) for total in totals[name, length])
        tokens = count * len(times)
        rows.append(
            Row(
                name,
                length,
                tokens / sum(times),
                tokens / passes,
                kept / proposed if proposed else 0.0,
                statistics.median(ratios),
                ratios[len(ratios) // 10],
                ratios[-1 - len(ratios) // 10],
            )
        )
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """Return the rows as a table; the speed-up's range is that of the middle eight tenths of the prompts."""
    lines = ["| draft | ahead | tokens/s | tokens a pass | kept | speed-up |", "|---|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row.speedup:.2f} ({row.low:.2f} … {row.high:.2f})"
        lines.append(
            f"| {row.name} | {row.ahead} | {row.tokens_per_second:.1f} | {row.tokens_per_pass:.2f} | "
            f"{100 * row.accepted:.0f} % | {spread} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write a JSON and, beside it, the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.draft")
    parser.add_argument("models", nargs="+", help="NAME=FOLDER, ONNX; the first is the target")
    parser.add_argument("--hf", type=Path, required=True, help="the folder whose tokenizer they share")
    parser.add_argument(
        "--evaluate", type=Path, help="text that prompts are taken from; default: the built-in speeches"
    )
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--count", type=int, default=64, help="tokens to go on for")
    parser.add_argument("--ahead", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    named = dict(model.split("=", 1) for model in options.models)
    target, *drafts = (Rewindable(Path(folder), CPU, options.threads, name) for name, folder in named.items())
    proposers: dict[str, Propose | None] = {draft.name: from_model(draft) for draft in drafts} | {NGRAM: None}
    prompts = _prompts(options)
    rows = measure(target, proposers, prompts, options.count, options.ahead)
    shared = ("prompts", "prompt", "count", "threads")
    document = {
        "evaluation": options.evaluate.name if options.evaluate else "built-in speeches",
        **{key: getattr(options, key) for key in shared},
        "machine": asdict(describe_machine(options.threads)),
        "rows": [asdict(row) for row in rows],
    }
    write_atomic(options.out, json.dumps(document, indent=1) + "\n")
    print(markdown(rows))


def _prompts(options: argparse.Namespace) -> IntArray:
    """Return the beginnings of blocks, spread over the text: [prompts, prompt]."""
    source = {"path": (options.evaluate,)} if options.evaluate else {"builtin": "speeches"}
    data = DataSettings.model_validate({**source, "block": 2 * options.prompt})
    blocks = load_blocks(tokenizer_of(options.hf), data, "evaluation").tokens.numpy()
    chosen = np.linspace(0, len(blocks) - 1, options.prompts).astype(int)
    return np.ascontiguousarray(blocks[chosen, : options.prompt])


if __name__ == "__main__":
    main()
