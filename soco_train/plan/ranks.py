"""How a budget of parameters becomes one rank per layer (rules: allocation.py). Pure: no modules, no files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from soco_train.errors import DataError, RecipeError
from soco_train.plan.allocation import (
    Ladder,
    Limit,
    Reals,
    global_ranks,
    make_ladder,
    refuse_impossible,
    uniform_ranks,
)
from soco_train.plan.left_out import few_numbers, read_left_out
from soco_train.plan.rank_plan import LayerPlan, RankPlan
from soco_train.plan.values import ValueLosses, ranks_or_numbers, read_value_losses
from soco_train.settings.plan import PlanSettings
from soco_train.store.importances import Importances, LayerImportance

if TYPE_CHECKING:
    import torch

    from soco_train.store.scores import Scores


def plan_ranks(
    scores: Scores | Importances,
    settings: PlanSettings,
    extra_cost: Mapping[str, int] | None = None,
    limits: Mapping[str, Limit] | None = None,
) -> RankPlan:
    """Choose every layer's rank so that the parameters sum to at most keep_params · Σ m·n.

    Of `scores` it reads the importances, which are enough.
    `extra_cost` is what a layer pays on top once it is pruned; by default m for a layer with a deviation (pass 0 where
    the deviation merges into an existing bias). `limits` keep layers dense from a rank on, whatever they would save.
    Ties go by (importance descending, layer order, index). Raises DataError for importances that are not finite or not
    one per component, RecipeError if rank 1 everywhere (or `multiple`) is already too much.
    """
    found = scores if isinstance(scores, Importances) else scores.importances()
    extra = _deviation_cost(found) if extra_cost is None else extra_cost
    importances = [_checked(name, layer) for name, layer in found.layers.items()]
    ends = limits or {}
    ladders = [
        make_ladder(layer.shape, settings, extra.get(name, 0), ends.get(name)) for name, layer in found.layers.items()
    ]
    keep = Fraction(str(settings.keep_params))  # the decimal the user wrote, so that no parameter is lost to rounding
    sites = _value_losses(found, settings)
    numbers: dict[str, int] = {}
    if settings.allocation == "uniform":
        survivors = uniform_ranks(ladders, keep)
    else:
        budget = int(keep * sum(m * n for m, n in (ladder.shape for ladder in ladders)))
        refuse_impossible(ladders, keep)
        if settings.allocation == "global":
            survivors = global_ranks(ladders, importances, budget)
        else:
            survivors, numbers = ranks_or_numbers(found.layers, ladders, importances, sites, budget)
    layers = dict(zip(found.layers, map(_layer_plan, ladders, survivors), strict=True))
    for site in (site for site in sites if site.value in numbers):
        layers |= {name: _fewer(layers[name], site, numbers[site.value]) for name in (site.value, site.output)}
    rest = read_left_out(found.provenance.get("left_out", {}))
    return RankPlan(layers, settings.keep_params, settings.storage, settings.allocation, left_out=rest, values=numbers)


def kept(importance: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the sorted indices [rank] of the surviving components; among equals the lower index survives."""
    order = importance.sort(descending=True, stable=True).indices
    return order[:rank].sort().values


def _deviation_cost(scores: Importances) -> dict[str, int]:
    return {name: layer.shape[0] for name, layer in scores.layers.items() if layer.deviates}


def _checked(name: str, layer: LayerImportance) -> Reals:
    importance = layer.importance
    if importance.shape != (min(layer.shape),) or not bool(np.isfinite(importance).all()):
        raise DataError(
            f"importance {list(importance.shape)} of a {layer.shape} layer must be {min(layer.shape)} finite numbers",
            fix="train the scores again",
            where=name,
        )
    return importance


def _value_losses(scores: Importances, settings: PlanSettings) -> list[ValueLosses]:
    """Return what attentions lose with fewer numbers a value head; RecipeError for a rule that cannot weigh that."""
    shapes = {name: layer.shape for name, layer in scores.layers.items()}
    sites = read_value_losses(scores.provenance.get("values", []), shapes)
    if sites and settings.allocation != "lagrangian":
        raise RecipeError(
            f"allocation {settings.allocation} ranks components, and fewer numbers a value head are none",
            fix="allocation: lagrangian, or a share for refine.values.keep",
            where="recipe: allocation",
        )
    return sites


def _fewer(layer: LayerPlan, site: ValueLosses, numbers: int) -> LayerPlan:
    m, n = layer.shape
    return replace(layer, params=m * n * numbers // site.size, reason=few_numbers(numbers, site.size))


def _layer_plan(ladder: Ladder, survivors: int) -> LayerPlan:
    rung = int(ladder.rung_of[survivors])
    dense = rung == len(ladder.ranks) - 1
    reason = _reason(ladder) if dense else ""
    return LayerPlan(ladder.shape, int(ladder.ranks[rung]), dense, int(ladder.costs[rung]), reason)


def _reason(ladder: Ladder) -> str:
    """Say why a layer that reached the last rung is dense: from the rank where dense is cheaper, the rest is free."""
    k, last = ladder.components, len(ladder.ranks) - 1
    first = int(np.argmax(ladder.rung_of == last))
    if ladder.limit is not None and first < k:
        return ladder.limit.reason
    if last == 0:
        return "no allowed rank is cheaper than dense"
    return f"all {k} components survive" if first == k else f"cheaper dense than rank {first} of {k}"
