"""Mixed-rank distillation: one set of distilled factors that can be cut to any size afterwards.

    loss of a step = KL(dense ‖ all components) + KL(dense ‖ the first r_l components of each layer l)

The r_l are what the plan gives at a size that is drawn anew in each step, between `refine.distill.sizes`. Components
stand in the order of their scores, so a smaller plan's are a prefix of a larger one's, and after the distillation the
cut is a slice: nothing is trained anew. A layer that is dense at the largest size has all its components.
Source: LPAF (arXiv 2306.14152), whose mixed-rank fine-tuning draws one rank for all layers; here the plan decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from soco_train.errors import RecipeError
from soco_train.forms.base import LayerFactors
from soco_train.forms.dense import DenseWeight
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.refine.cut import cut_layer, store_as
from soco_train.refine.distill import Smaller, distill
from soco_train.refine.ladder import name_training
from soco_train.settings.distill import DistillSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores

Planner = Callable[[float], RankPlan]  # size → plan


def distill_any_size(
    subject: Subject,
    scores: Scores,
    planner: Planner,
    settings: DistillSettings,
    session: Session,
    provenance: Mapping[str, object],
) -> Factors:
    """Return factors in score order, for every layer that is pruned at the smallest of `settings.sizes`.

    Raises RecipeError for scores with an adapter beside them, or a rank at a smaller size that is above the one at the
    largest, DataError for a loss that is not finite.
    """
    assert settings.sizes is not None
    if any(layer.adapter is not None for layer in scores.layers.values()):
        raise RecipeError(
            "these scores have an adapter beside the components, which no prefix holds",
            fix="another train.scorer, or no refine.distill.sizes",
            where="recipe: refine.distill.sizes",
        )
    smallest, largest = map(planner, settings.sizes)
    layers = {
        name: _in_order(subject, scores, name, largest.layers[name].rank)
        for name, planned in smallest.layers.items()
        if not planned.dense
    }
    named = session.named(name_training(settings, layers, session))
    smaller = Smaller(settings.sizes, lambda size: ranks_at(planner(size), layers), session.seed)
    done = distill(subject, layers, settings, named, smaller) if settings.steps and layers else dict(layers)
    return Factors(done, {**provenance, "sizes": list(settings.sizes), "scores": dict(scores.provenance)})


def _in_order(subject: Subject, scores: Scores, name: str, rank: int) -> StackedFactors:
    order = scores.layers[name].importance.sort(descending=True, stable=True).indices[:rank]
    bias = subject.linears[name].bias
    return cut_layer(subject.spectra[name], scores.layers[name], order, None if bias is None else bias.detach().cpu())


def ranks_at(plan: RankPlan, layers: Mapping[str, StackedFactors]) -> dict[str, int]:
    """Return how many of its components each layer has at the size of `plan`; RecipeError if that is more than all."""
    ranks = {name: plan.layers[name].rank for name in layers}
    for name, layer in layers.items():
        if ranks[name] > layer.down.shape[0]:
            raise RecipeError(
                f"{name} has rank {ranks[name]} at keep_params {plan.keep_params:g}, and {layer.down.shape[0]} at most",
                fix="give a size within refine.distill.sizes, and allocation: global or uniform",
                where="recipe: keep_params",
            )
    return ranks


def cut_to(whole: Factors, plan: RankPlan) -> Factors:
    """Return the factors of one size: the first components of each layer, as many as `plan` has, stored as it says.

    A layer that is dense at this size becomes the product of all its components. Raises RecipeError for a size that
    the distillation was not for.
    """
    layers = {name: layer for name, layer in whole.layers.items() if isinstance(layer, StackedFactors)}
    strangers = [name for name, planned in plan.layers.items() if not planned.dense and name not in layers]
    if strangers:
        raise RecipeError(
            f"{strangers[0]} was not distilled: it is dense at every size down to that of refine.distill.sizes",
            fix="give a size within refine.distill.sizes",
            where="recipe: keep_params",
        )
    ranks = ranks_at(plan, layers)
    cut: dict[str, LayerFactors] = {
        name: _whole(layer) if plan.layers[name].dense else prefix(layer, ranks[name]) for name, layer in layers.items()
    }
    stored = store_as(cut, plan.storage, plan.forms)
    return Factors(stored, {**whole.provenance, "keep_params": plan.keep_params})


def prefix(layer: StackedFactors, rank: int) -> StackedFactors:
    """Return the first `rank` components of a layer."""
    return replace(layer, up=layer.up[:, :rank].contiguous(), down=layer.down[:rank].contiguous())


def _whole(layer: StackedFactors) -> DenseWeight:
    return DenseWeight((layer.up.double() @ layer.down.double()).to(layer.up.dtype), layer.bias)
