"""Weights as block quantisation will leave them, so that distillation can train the numbers that really run.

The rounding is the export's own (soco_train.numbers). The gradient passes straight
through (arXiv 1308.3432): what is trained, kept and stored are the numbers before rounding.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from soco_train.errors import RecipeError
from soco_train.forms.registry import find_form
from soco_train.numbers.blocks import Grid, nearest
from soco_train.settings import BITS, RoundingSettings, Storage


def of_layer(settings: RoundingSettings, name: str) -> RoundingSettings:
    """Return the rounding of the layer `name`, `same` if it has none."""
    weights = settings.each.get(name, "same") if settings.weights == "planned" else settings.weights
    kept = any(fnmatchcase(name, glob) for glob in settings.keep)
    block = settings.blocks.get(name, settings.block)
    return settings.model_copy(
        update={"weights": "same" if kept else weights, "each": {}, "block": block, "blocks": {}}
    )


def rounds(settings: RoundingSettings, name: str) -> bool:
    """Tell whether the layer `name` will be rounded."""
    return of_layer(settings, name).weights != "same"


def trains_dense(settings: RoundingSettings, name: str) -> bool:
    """Tell whether the layer `name` is trained as rounded where it stays dense."""
    return settings.dense and rounds(settings, name)


def check_rounding(settings: RoundingSettings, storage: Storage) -> None:
    """Raise RecipeError if the factors are stored in another form than is rounded while they are trained."""
    if settings.weights != "same" and not find_form(storage).rounded_as_trained:
        raise RecipeError(
            f"refine.distill.rounding rounds stacked factors, but storage is {storage}, whose numbers are others",
            fix="storage: stacked, or refine.distill.rounding.weights: same",
            where="recipe: refine.distill.rounding.weights",
        )


def rounded(weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
    """weight: [m, n] → what is left of it by the settings of its layer, float32; its gradient is that of `weight`."""
    values: torch.Tensor = _StraightThrough.apply(weight, settings)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
        return nearest(weight.float(), Grid(BITS[settings.weights], settings.block, settings.symmetric)).values()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
