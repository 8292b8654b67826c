"""The rules by which a layer is rounded: one decorated function each, for a dense weight and for a pair of factors.

A layer is the chain of matrices that its input goes through, [weight] or [down, up]. To add a rule, write a function
that returns the levels of each and decorate it; `export.quantize.rule` then takes its name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from soco_train.errors import RecipeError
from soco_train.numbers.blocks import Grid, Levels, nearest, stack
from soco_train.numbers.feedback import Curvature, calibrated, curvature
from soco_train.numbers.pair import calibrated_pair

Chain = Sequence[torch.Tensor]
_ROWS = 8192  # of a dense weight rounded at one time


@dataclass(frozen=True)
class Inputs:
    """What a layer reads: C = E[x xᵀ] [n, n] in float64 over `tokens` tokens, and C made ready for rounding."""

    covariance: torch.Tensor
    known: Curvature
    tokens: int


RoundLayer = Callable[[Chain, Grid, Inputs | None], list[Levels]]


@dataclass(frozen=True)
class Rounding:
    """A registered rule; `calibrates`: it needs to know the layer's inputs."""

    layer: RoundLayer
    calibrates: bool


_RULES: dict[str, Rounding] = {}


def rounding(name: str, calibrates: bool = False) -> Callable[[RoundLayer], RoundLayer]:
    """Register the decorated function under `name` (recipe key export.quantize.rule)."""

    def register(layer: RoundLayer) -> RoundLayer:
        _RULES[name] = Rounding(layer, calibrates)
        return layer

    return register


def find_rounding(name: str) -> Rounding:
    """Return a registered rule; RecipeError for an unknown name."""
    if name not in _RULES:
        raise RecipeError(
            f"no rule of rounding is called {name!r}",
            fix=f"one of {', '.join(_RULES)}",
            where="recipe: export.quantize.rule",
        )
    return _RULES[name]


@rounding("nearest")
def _nearest(chain: Chain, grid: Grid, inputs: Inputs | None) -> list[Levels]:
    return [nearest(matrix, grid) for matrix in chain]


@rounding("calibrated", calibrates=True)
def _calibrated(chain: Chain, grid: Grid, inputs: Inputs | None) -> list[Levels]:
    if inputs is None:
        raise ValueError("calibrated rounding needs the layer's inputs")
    if len(chain) == 1:
        # Rows do not meet: a head of a hundred thousand needs no more memory than some of them.
        parts = [calibrated(rows, grid, inputs.known) for rows in chain[0].split(_ROWS)]
        return [stack(parts)]
    return list(calibrated_pair(chain[0], chain[1], grid, inputs.known, inputs.covariance))


def levels(weight: torch.Tensor, bits: int, block: int, symmetric: bool, hessian: torch.Tensor | None = None) -> Levels:
    """Round a matrix [m, n]: to nearest, or for inputs of second moment `hessian` [n, n]; see Levels for what comes."""
    grid = Grid(bits, block, symmetric)
    return nearest(weight, grid) if hessian is None else calibrated(weight, grid, curvature(hessian, weight.dtype))
