"""The plan of a run whose budget is bytes: from the measured damage to ranks, forms and types of weights.

    damage ── by price ──────────────────────────────┐
                                                     ├─ each rounded as the export will, and run ── the least KL
    damage ── dense in one type and block, that fit ─┘

The price adds errors of layers and knows them to second order; among a few candidates the divergence of
their predictions from the dense model decides, on text that the price has not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from soco_export.model.file_bytes import FileBytes
from soco_export.recipe.recipe import Recipe
from soco_train.plan.allocation import layer_cost
from soco_train.plan.bytes import Choice
from soco_train.plan.rank_plan import BytePlan, LayerPlan, RankPlan
from soco_train.store.damage import DENSE, Damage, LayerDamage

BY_PRICE = "by price"


def plan_bytes(recipe: Recipe, damage: Damage) -> RankPlan:
    """Return the plan for `keep_bytes` by price alone; RecipeError if no file of the model can be that small."""
    file = FileBytes(recipe)
    assert recipe.keep_bytes is not None
    return _plan(file, recipe.keep_bytes, damage, BY_PRICE, file.plan(damage, recipe.keep_bytes)[0])


def plan_bytes_measured(recipe: Recipe, damage: Damage, loss: Callable[[RankPlan], float], tokens: int) -> RankPlan:
    """Return, among the candidates for `keep_bytes`, the plan of least `loss` on `tokens` tokens, as PlanLoss has it.

    RecipeError if no file of the model can be that small.
    """
    file = FileBytes(recipe)
    assert recipe.keep_bytes is not None
    plans = {
        name: _plan(file, recipe.keep_bytes, damage, name, choices)
        for name, choices in file.candidates(damage, recipe.keep_bytes).items()
    }
    if not plans:
        return plan_bytes(recipe, damage)
    losses = {name: loss(plan) for name, plan in plans.items()}
    best = plans[min(losses, key=lambda name: losses[name])]
    assert best.bytes is not None
    return replace(best, bytes=replace(best.bytes, measured=losses, tokens=tokens))


def _plan(file: FileBytes, keep_bytes: int, damage: Damage, chosen: str, choices: Mapping[str, Choice]) -> RankPlan:
    layers = {name: _layer(damage.layers[name], choices[name]) for name in file.priced(damage)}
    forms = {name: choice.form for name, choice in choices.items() if choice.form != DENSE}
    plan = BytePlan(keep_bytes, file.count(choices, damage), forms, *file.types(choices), chosen=chosen)
    return RankPlan(layers, _share(layers), file.recipe.storage, "lagrangian", plan, file.unpriced(damage))


def _layer(damage: LayerDamage, choice: Choice) -> LayerPlan:
    m, n = damage.shape
    dense = choice.form == DENSE
    extra = m if damage.biased and not dense else 0
    params = m * n if dense else layer_cost(choice.rank, m, n, choice.form) + extra
    return LayerPlan(damage.shape, choice.rank, dense, params, f"worth its bytes in {choice.weights}" if dense else "")


def _share(layers: Mapping[str, LayerPlan]) -> float:
    """Return the share of parameters that stays, at most 1: where floats become levels more of them can be cheaper."""
    before = sum(layer.shape[0] * layer.shape[1] for layer in layers.values())
    return min(1.0, sum(layer.params for layer in layers.values()) / before)
