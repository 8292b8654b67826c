"""How far a model is from the dense one as a plan for bytes would export it, nothing trained: what tells plans apart.

It is KL and no cross entropy: two roundings differ by less than the noise of the latter on a few thousand tokens.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from soco_export.checkpoint.layers import apply_factors
from soco_export.onnx.calibrate import KeptLevels
from soco_export.onnx.rounded import round_as_exported
from soco_export.onnx.settings import ExportSettings
from soco_train import method
from soco_train.learn.divergence import divergence
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import RankPlan
from soco_train.settings import RefineSettings
from soco_train.store.scores import Scores

_SHARE = 8  # one block in so many is held out
_TOKENS = 16384  # held out at most


def hold_out(tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (blocks to learn prices from, the last ones to measure on) of tokens [n, t]; of one block both are it."""
    n, t = tokens.shape
    held = max(1, min(n // _SHARE, _TOKENS // t))
    return (tokens[:-held] if n > held else tokens), tokens[-held:]


class PlanLoss:
    """Called with a plan, returns the mean KL(dense ‖ planned) at a token of `held` [n, t].

    texts: calibration blocks for the rule of rounding, and `held`; work: a folder for what cutting keeps on disk.
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
        self.levels = KeptLevels(work / "levels")
        self.seen = seen[: max(1, export.quantize.calibration_tokens // seen.shape[1])]

    def __call__(self, plan: RankPlan) -> float:
        """Return the divergence of the dense model's predictions, cut and rounded as planned."""
        model = copy.deepcopy(self.subject.model)
        factors = method.cut_factors(self.subject, self.scores, plan, RefineSettings(), Session(self.work))
        apply_factors(model, factors.made())
        round_as_exported(model, self.seen, self.export.planned(plan.weights, plan.blocks), self.levels)
        with torch.no_grad():
            return float(torch.stack([self._divergence(model.eval(), block[None]) for block in self.held]).mean())

    def _divergence(self, model: nn.Module, block: torch.Tensor) -> torch.Tensor:
        block = block.to(next(model.parameters()).device)
        student, teacher = (one(input_ids=block, use_cache=False).logits for one in (model, self.subject.model))
        return divergence(student, teacher, block)[1]
