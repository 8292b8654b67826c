"""Weights as block quantisation will leave them, so that distillation can train the factors that really run.

A block is `block` inputs of one row with one scale, as ONNX Runtime's MatMulNBits has it. The gradient passes straight
through (arXiv 1308.3432): what is trained, kept and stored are the numbers before rounding.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch
from torch.nn import functional

from soco_train.errors import RecipeError
from soco_train.settings import BITS, RoundingSettings, Storage


def rounds(settings: RoundingSettings, name: str) -> bool:
    """Tell whether the layer `name` will be rounded."""
    return settings.weights != "same" and not any(fnmatchcase(name, glob) for glob in settings.keep)


def check_rounding(settings: RoundingSettings, storage: Storage) -> None:
    """Raise RecipeError if the factors are stored in another form than is rounded while they are trained."""
    if settings.weights != "same" and storage == "pivoted":
        raise RecipeError(
            "refine.distill.rounding rounds stacked factors, but storage is pivoted, whose numbers are others",
            fix="storage: stacked, or refine.distill.rounding.weights: same",
            where="recipe: refine.distill.rounding.weights",
        )


def rounded(weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
    """weight: [m, n] → what is left of it, in float32; its gradient is that of `weight`."""
    values: torch.Tensor = _StraightThrough.apply(weight, settings)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
        m, n = weight.shape
        blocks = functional.pad(weight.float(), (0, -n % settings.block)).view(m, -1, settings.block)
        top = 2 ** BITS[settings.weights] - 1
        scales, zeros = (_symmetric if settings.symmetric else _asymmetric)(blocks, top)
        levels = (blocks / torch.where(scales == 0, 1, scales)).round_().add_(zeros).clamp_(0, top)
        return levels.sub_(zeros).mul_(scales).view(m, -1)[:, :n]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def _symmetric(blocks: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros): the number of largest magnitude is at the end that has one level more."""
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    half = (top + 1) // 2
    extreme = torch.where(-low > high, low, high)
    return extreme / -half, torch.full_like(extreme, half)


def _asymmetric(blocks: torch.Tensor, top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (scales, zeros): the range of the numbers and 0 is the whole range of levels, 0 is one of these."""
    low, high = blocks.amin(-1, keepdim=True).clamp(max=0), blocks.amax(-1, keepdim=True).clamp(min=0)
    scales = (high - low) / top
    return scales, (-low / torch.where(scales == 0, 1, scales)).round().clamp(0, top)
