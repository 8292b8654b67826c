"""The plan of a run whose budget is bytes: from the measured damage to ranks, forms and types of weights."""

from __future__ import annotations

from collections.abc import Mapping

from soco_export.model.file_bytes import FileBytes
from soco_export.recipe.recipe import Recipe
from soco_train.plan.allocation import layer_cost
from soco_train.plan.bytes import Choice
from soco_train.plan.ranks import BytePlan, LayerPlan, RankPlan
from soco_train.store.damage import DENSE, Damage, LayerDamage


def plan_bytes(recipe: Recipe, damage: Damage) -> RankPlan:
    """Return the plan for `keep_bytes`; RecipeError if no file of the model can be that small."""
    file = FileBytes(recipe)
    assert recipe.keep_bytes is not None
    choices, written = file.plan(damage, recipe.keep_bytes)
    layers = {name: _layer(damage.layers[name], choices[name]) for name in file.linears}
    forms = {name: choice.form for name, choice in choices.items() if choice.form != DENSE}
    plan = BytePlan(recipe.keep_bytes, written, forms, file.weights(choices))
    return RankPlan(layers, _share(layers), recipe.storage, "lagrangian", plan, file.left_out)


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
