"""How far a model is from the dense one as a plan for bytes would export it, nothing trained: what tells plans apart.

It is KL and no cross entropy: two roundings differ by less than the noise of the latter on a few thousand tokens.
"""

from __future__ import annotations

import copy
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from soco_export.checkpoint.layers import apply_factors
from soco_export.onnx.rounded import Rounder, round_as_exported
from soco_export.onnx.settings import ExportSettings
from soco_train import method
from soco_train.learn.divergence import divergence
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.refine import RefineSettings
from soco_train.store.scores import Scores

_SHARE = 8  # one block in so many is held out
_TOKENS = 4096  # held out at most; the dense model's logits of them are held in memory
_FINEST = 4  # bits; what calibration takes off an error of int8 is less than such a text shows


def hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks to learn prices from, the last ones to measure on) of tokens [n, t]; of one block both are it."""
    n, t = tokens.shape
    held = max(1, min(n // _SHARE, _TOKENS // t))
    return (tokens[:-held] if n > held else tokens), tokens[-held:]


class PlanLoss:
    """Called with a plan, returns the mean KL(dense ‖ planned) at a token of `held` [n, t].

    texts: calibration blocks for the rule of rounding, and `held`; work: a folder for what is found once for all plans,
    also of later sizes: inputs of layers, and the levels of each layer in each form and type that was asked for.
    """

    def __init__(
        self,
        subject: Subject,
        scores: Scores,
        export: ExportSettings,
        texts: tuple[torch.Tensor, torch.Tensor],
        work: Path,
    ) -> None:
        self.subject, self.scores, self.export, self.work = subject, scores, export, work
        seen, self.held = texts
        few = seen[: max(1, export.quantize.calibration_tokens // seen.shape[1])]
        self.rounder = Rounder(subject.model, few, work, _FINEST)

    def __call__(self, plan: RankPlan) -> float:
        """Return the divergence of the dense model's predictions, cut and rounded as planned."""
        model = self.model(plan)
        with torch.no_grad():
            each = [
                divergence(_logits(model, block), teacher, block[None])[1]
                for block, teacher in zip(self.held, self._dense, strict=True)
            ]
        return float(torch.stack(each).mean())

    def model(self, plan: RankPlan) -> nn.Module:
        """Return the model cut and rounded as planned, each layer for what it reads in the dense one."""
        model = copy.deepcopy(self.subject.model)
        factors = method.cut_factors(self.subject, self.scores, plan, RefineSettings(), Session(self.work))
        apply_factors(model, factors.made())
        round_as_exported(model, self.export.planned(plan.weights, plan.blocks), self.rounder)
        return model.eval()

    @cached_property
    def _dense(self) -> list[torch.Tensor]:
        """The dense model's logits [1, t, V] of each block."""
        with torch.no_grad():
            return [_logits(self.subject.model, block) for block in self.held]


def _logits(model: nn.Module, block: torch.Tensor) -> torch.Tensor:
    block = block.to(next(model.parameters()).device)
    logits: torch.Tensor = model(input_ids=block[None], use_cache=False).logits
    return logits.cpu()
