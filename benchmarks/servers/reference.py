"""What PyTorch's low-rank model says, and the judgement of what a server said.

Two implementations of the same sums differ in the last bits, so where the two largest logits of a step lie closer than
that, both tokens are right and everything after them is another text. Such an answer is not waved through: PyTorch
reads it again, and at every step the token must lie within TIE of PyTorch's largest logit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer

from soco_export.checkpoint.load import load_checkpoint
from soco_export.evaluate.decoders.decoder import TorchDecoder

TIE = 1e-3  # logits; exports agree with PyTorch to about this much


@dataclass(frozen=True)
class Answer:
    """The tokens of one prompt, as the server's own tokenizer has them, and the greedy tokens after it."""

    ids: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Verdict:
    """`gap`: 0 if the tokens are PyTorch's, else how far the worst one lies below PyTorch's largest logit.

    `why` says what is wrong, and is empty where nothing is.
    """

    tokens: int
    gap: float = 0.0
    why: str = ""


class Reference:
    """PyTorch's low-rank model of one run, and its answers to `prompts`."""

    def __init__(self, run: Path, prompts: Sequence[str], tokens: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(run / "hf")
        model = load_checkpoint(run / "hf").float()
        end = model.generation_config.eos_token_id
        self.ends = set(end if isinstance(end, list) else [end])
        self.decoder = TorchDecoder(model, "low-rank")
        self.count = tokens
        self.answers = [self._answer(prompt) for prompt in prompts]

    def judge(self, number: int, given: Answer) -> Verdict:
        """Judge what a server answered to prompt `number`."""
        expected = self.answers[number]
        if given.ids != expected.ids:
            return Verdict(0, why=f"its tokenizer reads {len(given.ids)} tokens that are not PyTorch's")
        if given.tokens == expected.tokens:
            return Verdict(len(given.tokens))
        ended = next((i + 1 for i, token in enumerate(given.tokens) if token in self.ends), self.count)
        if len(given.tokens) != ended:
            return Verdict(len(given.tokens), why=f"{len(given.tokens)} tokens instead of {ended}")
        gaps = self._gaps(given)
        worst = int(gaps.argmax())
        why = "" if gaps[worst] <= TIE else f"token {worst + 1} lies {gaps[worst]:.2g} below PyTorch's"
        return Verdict(len(given.tokens), float(gaps[worst]), why)

    def _gaps(self, given: Answer) -> np.ndarray:
        """Return by how much each token's logit misses the largest one, in PyTorch, after the tokens before it."""
        whole = np.array([given.ids + given.tokens], np.int64)
        logits = self.decoder.logits(whole)[0, len(given.ids) - 1 : -1]
        return np.asarray(logits.max(-1) - logits[np.arange(len(given.tokens)), given.tokens])

    def _answer(self, prompt: str) -> Answer:
        ids = list(self.tokenizer(prompt)["input_ids"])
        tokens = self.decoder.generate(np.array([ids], np.int64), self.count)[0].tolist()
        ended = next((i + 1 for i, token in enumerate(tokens) if token in self.ends), self.count)
        return Answer(ids, tokens[:ended])
