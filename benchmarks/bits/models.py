"""The models that are rounded: dense or cut, as they are or trained, each a Hugging Face folder.

Whatever is trained gets the same: so many tokens in the same order, the same optimiser, and the same learning rates, of
which the one with the least divergence from the dense model on blocks that none has learnt from is taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from soco_train import cut_factors, learn_scores, plan_ranks
from soco_train.events import Event
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import Scores

TRAINED = "trained"  # the rule of a row that was
LEARNING_RATES = (1e-4, 3e-4, 1e-3)
LEARNING = DistillSettings(steps=60, batch_tokens=1024, held_out_blocks=16, evaluate_every=20)  # in blocks of 256
_HELD_OUT = 4096  # tokens


@dataclass(frozen=True)
class Found:
    """A folder; if it was trained, its learning rate, and the held-out divergence of each that was tried."""

    folder: Path
    lr: float | None
    divergences: Mapping[str, float] | None


class Subject:
    """The dense model in `folder`, cut to `keep` of its numbers (1: not at all) by what the first `tokens` say.

    text: calibration blocks [n, t]; work: where its spectra and what is made of it lie.
    """

    def __init__(self, folder: Path, keep: float, text: torch.Tensor, tokens: int, work: Path) -> None:
        self.folder, self.keep, self.text, self.work = folder, keep, text, work
        self.plan = PlanSettings(keep_params=keep, allocation="lagrangian")
        self.few = text[: max(1, tokens // text.shape[1])]

    @cached_property
    def scores(self) -> Scores:
        """Which components are kept: by their Fisher information; at full size it does not matter."""
        scorer = "fisher" if self.keep < 1 else "singular-values"
        train = TrainSettings(scorer=scorer, basis="whitened", fisher_blocks=16)
        return learn_scores(load_checkpoint(self.folder, dtype=torch.float32), self.few, self.work, train, self.plan)

    def cut(self) -> Path:
        """Return the folder of the cut model, nothing trained."""
        return self._save(self.work / "cut", RefineSettings(), [])

    def trained(self, rounding: RoundingSettings, rates: Sequence[float] = LEARNING_RATES) -> Found:
        """Return the best of the models trained as `rounding` leaves them; its divergences are in that form."""
        found = {lr: self._train(lr, rounding) for lr in rates}
        lr = min(found, key=lambda lr: found[lr][1])
        return Found(found[lr][0], lr, {f"{lr:g}": divergence for lr, (_, divergence) in found.items()})

    def _train(self, lr: float, rounding: RoundingSettings) -> tuple[Path, float]:
        events: list[Event] = []
        settings = learning(self.text.shape[1], lr=lr, rounding=rounding)
        name = f"{rounding.weights}-{rounding.block}-{lr:g}"
        folder = self._save(self.work / name, RefineSettings(distill=settings), events)
        return folder, least_divergence(events)

    def _save(self, out: Path, refine: RefineSettings, events: list[Event]) -> Path:
        model = load_checkpoint(self.folder, dtype=torch.float32)
        ranks = plan_ranks(self.scores, self.plan)
        apply_factors(model, cut_factors(model, self.text, self.scores, ranks, self.work, refine, events.append))
        save_checkpoint(model, tokenizer_of(self.folder), out)
        return out


def learning(block: int, **how: Any) -> DistillSettings:
    """Return LEARNING for blocks of so many tokens: as many tokens in all, and as many of them held out."""
    batch = max(LEARNING.batch_tokens, block)
    steps = LEARNING.steps * LEARNING.batch_tokens // batch
    sizes = {"steps": steps, "batch_tokens": batch, "held_out_blocks": max(1, _HELD_OUT // block)}
    return LEARNING.model_copy(update={**sizes, "evaluate_every": max(1, steps // 3), **how})


def least_divergence(events: Sequence[Event]) -> float:
    """Return the least divergence from the dense model that a distillation saw on its held-out blocks."""
    return min(float(event.values["held-out loss"]) for event in events if "held-out loss" in event.values)


def tokenizer_of(folder: Path) -> Any:
    """Return the tokenizer that lies in a folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)
