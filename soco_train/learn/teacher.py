"""What distillation imitates: the dense model's predictions, made afresh or remembered block by block.

A dense forward pass is a third of a distillation step, and it says the same each time the block comes back: in another
epoch, after an interruption, or at another size if that has the same folder. With `top` > 0 the `top` likeliest tokens
of every position are kept there, a file per block, named by its content. They are exact; the rest of the vocabulary is
one bucket of its true weight, so the divergence from them is a lower bound of the whole one, close where the rest is
light.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from soco_train.store.tensorfile import read_tensors, write_tensors

_KIND = "predictions"


@dataclass(frozen=True)
class TopPredictions:
    """The likeliest tokens of every position; log_p: [..., k] in fp32, index: [..., k] int32."""

    log_p: torch.Tensor
    index: torch.Tensor

    @staticmethod
    def of(logits: torch.Tensor, top: int) -> TopPredictions:
        """Keep the `top` largest of logits [..., V], at most V - 1: then the rest is one token and nothing is lost."""
        log_p, index = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1] - 1))
        return TopPredictions(log_p, index.int())

    def completed(self, log_q: torch.Tensor) -> torch.Tensor:
        """Return a distribution over the vocabulary, [T, V]: the kept tokens as they are, the rest in the shape of q.

        Against q it has the divergence of the two with the rest as one bucket, and that divergence's gradient.
        """
        index = self.index.long()
        scale = _rest(self.log_p) - _rest(log_q.gather(1, index))
        return (log_q + scale[:, None]).scatter_(1, index, self.log_p)


def _rest(log_p: torch.Tensor) -> torch.Tensor:
    """Return log(1 - Σ p) of [T, k]; what fp32 rounds to nothing counts as its rounding."""
    return torch.log((1 - log_p.exp().sum(1)).clamp(min=torch.finfo(torch.float32).eps))


@dataclass(frozen=True)
class Teacher:
    """The dense model as a function of tokens; `answer` maps [b, t] to logits [b, t, V].

    `folder` is this model's alone: a block is all that its files are named by.
    """

    answer: Callable[[torch.Tensor], torch.Tensor]
    top: int
    folder: Path

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor | TopPredictions:
        """Return the predictions for tokens [b, t]: logits [b, t, V], or the kept ones, each [b, t, top]."""
        if not self.top:
            return self.answer(tokens)
        self.remember(tokens)
        kept = [read_tensors(self._file(row), _KIND)[0] for row in tokens]
        log_p, index = (torch.stack([block[part] for block in kept]).to(tokens.device) for part in ("log_p", "index"))
        return TopPredictions(log_p, index)

    def remember(self, tokens: torch.Tensor) -> None:
        """Ask the model for those of the blocks [b, t] that are not in the folder yet, and keep what it says there."""
        missing = [number for number, row in enumerate(tokens) if not self._file(row).exists()]
        if missing:
            self.folder.mkdir(parents=True, exist_ok=True)
            made = TopPredictions.of(self.answer(tokens[missing]), self.top)
            for number, log_p, index in zip(missing, made.log_p, made.index, strict=True):
                write_tensors(self._file(tokens[number]), {"log_p": log_p, "index": index}, {"kind": _KIND})

    def _file(self, row: torch.Tensor) -> Path:
        return self.folder / f"{_name(row)}.top{self.top}.safetensors"


def _name(row: torch.Tensor) -> str:
    return hashlib.sha256(row.cpu().numpy().tobytes()).hexdigest()[:32]
