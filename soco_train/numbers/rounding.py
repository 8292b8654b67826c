"""Weights as block quantisation will leave them, so that distillation can train the numbers that really run.

The rounding is the export's own, by the same rule (rules.py). The gradient passes straight through (arXiv 1308.3432):
what is trained, kept and stored are the numbers before rounding.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import torch

from soco_train.errors import RecipeError
from soco_train.forms.registry import find_form
from soco_train.numbers.blocks import Grid
from soco_train.numbers.rules import find_rounding
from soco_train.settings.plan import Storage
from soco_train.settings.rounding import BITS, RoundingSettings

_RULE_KEY = "refine.distill.rounding.rule"


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
    """Raise RecipeError for another form of storage than is rounded while it is trained, or a rule that cannot be."""
    if settings.weights == "same":
        return
    if not find_form(storage).rounded_as_trained:
        raise RecipeError(
            f"refine.distill.rounding rounds stacked factors, but storage is {storage}, whose numbers are others",
            fix="storage: stacked, or refine.distill.rounding.weights: same",
            where="recipe: refine.distill.rounding.weights",
        )
    _check_rule(settings)


def _check_rule(settings: RoundingSettings) -> None:
    rule = find_rounding(settings.rule, _RULE_KEY)
    if rule.calibrates:
        raise RecipeError(
            f"rounding by {settings.rule} asks what each layer reads, which changes with every step of training",
            fix=f"{_RULE_KEY}: nearest",
            where=f"recipe: {_RULE_KEY}",
        )
    if settings.weights != "planned":
        for block in {settings.block, *settings.blocks.values()}:
            rule.check(Grid(BITS[settings.weights], block, settings.symmetric))


def rounded(weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
    """weight: [m, n] → what is left of it by the settings of its layer, float32; its gradient is that of `weight`."""
    values: torch.Tensor = _StraightThrough.apply(weight, settings)
    return values


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, settings: RoundingSettings) -> torch.Tensor:
        grid = Grid(BITS[settings.weights], settings.block, settings.symmetric)
        return find_rounding(settings.rule).rows(weight.float(), grid).values()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None
