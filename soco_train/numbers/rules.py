"""The rules by which weights are rounded, by name: one decorated class each, for training and for every export.

To add one, write a class and decorate it; `export.quantize.rule` and `refine.distill.rounding.rule` then take its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import torch

from soco_train.errors import RecipeError
from soco_train.numbers.blocks import Grid, Levels, nearest, stack
from soco_train.numbers.feedback import Curvature, calibrated
from soco_train.numbers.pair import calibrated_pair

_ROWS = 8192  # of a dense weight rounded at one time


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: C = E[x xᵀ] [n, n] in float64 over `tokens` tokens, and C made ready for rounding."""

    covariance: torch.Tensor
    known: Curvature
    tokens: int


class Rounding:
    """A rule of rounding; a child overrides what differs from rounding to nearest.

    `calibrates`: its `layer` is asked, for which calibration text goes through the model; else, and for what no layer
    was seen to read (tables, pivoted factors, experts hardly chosen), `rows` is. `once_trained`: the rule that leaves
    of a layer about what training for this one leaves, by which a plan for bytes is made. `note`: what the report says
    of an export by this rule.
    """

    calibrates: ClassVar[bool] = False
    once_trained: ClassVar[str] = "calibrated"
    note: ClassVar[str] = ""

    def check(self, grid: Grid) -> None:
        """Raise RecipeError for a grid that it cannot round to; asked before anything starts."""

    def rows(self, weight: torch.Tensor, grid: Grid) -> Levels:
        """Round some rows [m, n] of a matrix by their numbers alone."""
        return nearest(weight, grid)

    def layer(self, chain: Sequence[torch.Tensor], grid: Grid, inputs: Inputs) -> list[Levels]:
        """Round the matrices that a layer's input goes through, [weight] or [down, up], for what the layer reads."""
        return [self.rows(matrix, grid) for matrix in chain]

    def layer_bytes(self, m: int, n: int) -> int:
        """Return the bytes that `layer` takes for a weight [m, n] beside it and C, for the cost card."""
        return 0


_RULES: dict[str, Rounding] = {}
_Rule = TypeVar("_Rule", bound=type[Rounding])


def rounding(name: str) -> Callable[[_Rule], _Rule]:
    """Register a rule under a name for recipes."""

    def register(rule: _Rule) -> _Rule:
        _RULES[name] = rule()
        return rule

    return register


def find_rounding(name: str, where: str = "export.quantize.rule") -> Rounding:
    """Return a registered rule; RecipeError for an unknown name. `where`: the recipe key that has it."""
    if name not in _RULES:
        raise RecipeError(
            f"no rule of rounding is called {name!r}", fix=f"one of {', '.join(_RULES)}", where=f"recipe: {where}"
        )
    return _RULES[name]


rounding("nearest")(Rounding)


@rounding("calibrated")
class _Calibrated(Rounding):
    """For what each layer reads; a pair of factors each for what the other became."""

    calibrates = True

    def layer(self, chain: Sequence[torch.Tensor], grid: Grid, inputs: Inputs) -> list[Levels]:
        if len(chain) == 1:
            # Rows do not meet: a head of a hundred thousand needs no more memory than some of them.
            return [stack([calibrated(rows, grid, inputs.known) for rows in chain[0].split(_ROWS)])]
        return list(calibrated_pair(chain[0], chain[1], grid, inputs.known, inputs.covariance))

    def layer_bytes(self, m: int, n: int) -> int:
        # C factorised in float64; then what is kept of it, and scales, levels and errors of some rows in fp32. Peaks of
        # dense layers and pairs of 512 to 4096 rows and inputs are 0.7 to 1.0 of it.
        return max(44 * n * n, 12 * n * n + 100 * min(m, _ROWS) * n)
