"""The loss of a model as a plan for bytes would export it, nothing trained: what candidates are told apart by."""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from soco_export.checkpoint.layers import apply_factors
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.onnx.calibrate import KeptLevels
from soco_export.onnx.rounded import round_as_exported
from soco_export.onnx.settings import ExportSettings
from soco_export.runtimes.open import torch_decoder
from soco_train import method
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
    """Called with a plan, returns the mean cross entropy of a token of `held` [n, t].

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
        """Return the loss of the dense model cut and rounded as planned."""
        model = copy.deepcopy(self.subject.model)
        factors = method.cut_factors(self.subject, self.scores, plan, RefineSettings(), Session(self.work))
        apply_factors(model, factors.made())
        round_as_exported(model, self.seen, self.export.planned(plan.weights, plan.blocks), self.levels)
        return measure_perplexity(torch_decoder(model.eval(), "candidate"), self.held).loss
