"""SoCo's scorer: scores learnt in three phases (arXiv 2502.15092), from s ≡ 1 or a closed-form warm start."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from soco_train.errors import RecipeError
from soco_train.events import Notify
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import plan_ranks
from soco_train.scores.closed_form import energy, saliency, untrained
from soco_train.scores.costs import learning_cost
from soco_train.scores.registry import scorer
from soco_train.scores.trainer import train_spectrum
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import Scores
from soco_train.store.spectra import Spectrum

SHARPNESS = 2.0


def _check(train: TrainSettings, plan: PlanSettings) -> None:
    if train.lr_factors and train.factor_dtype != "float32":
        raise RecipeError(
            f"components that learn would be updated in {train.factor_dtype}, which loses steps as small as these",
            fix="train.factor_dtype: float32, or train.lr_factors: 0",
            where="recipe: train.lr_factors",
        )


# the method that the settings are of: it reads all of them
@scorer("soco", reads=TrainSettings.model_fields, trains=True, check=_check, cost=learning_cost)
def soco(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Learn the scores by SoCo's three phases, from s ≡ 1 or from a closed-form warm start."""
    found = STARTS[train.start](subject, train, session.notify)
    start = None if found is None else wiener_start(subject, train, plan, found)
    return attributed(train_spectrum(subject, train, plan, session, start), subject.spectra, train)


def attributed(scores: Scores, spectra: Mapping[str, Spectrum], train: TrainSettings) -> Scores:
    """Take from learnt scores what `train.rescale` and `train.select` switch off; the ranks they lead to stay.

    Scores rescale, select and reallocate: with uniform ranks, and one of these two, each of the three can be had alone.
    """
    layers = {}
    for name, layer in scores.layers.items():
        importance, scale = layer.importance, layer.scale
        if not train.select:  # the same importances, given out in the order of σ
            order = spectra[name].sigma.to(importance).sort(descending=True, stable=True).indices
            importance = torch.empty_like(importance)
            importance[order] = layer.importance.sort(descending=True).values
        if not train.rescale:
            scale = torch.ones_like(scale)
        layers[name] = replace(layer, importance=importance, scale=scale)
    return Scores(layers, scores.provenance)


Start = Callable[[Subject, TrainSettings, Notify], Mapping[str, torch.Tensor] | None]
STARTS: dict[str, Start] = {
    "ones": lambda subject, train, notify: None,
    "fisher": saliency,
    "spectrum": lambda subject, train, notify: energy(subject),
}


def wiener_start(
    subject: Subject, train: TrainSettings, plan: PlanSettings, importance: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return s₀ = f² / (f² + c²) by layer: f the saliency, c the saliency at which the budget would cut that layer.

    Ours: replaces most of phase 1. At f = c a component starts undecided (s = ½), far above near 1, far below near 0,
    in the order of saliency. A layer that the budget leaves dense starts at s ≡ 1.
    """
    if plan.allocation != "uniform":  # equal shares are not the saliency's to give out
        plan = plan.model_copy(update={"allocation": "lagrangian"})
    ranks = plan_ranks(untrained(subject, train, importance), plan)
    start = {}
    for name, values in importance.items():
        layer = ranks.layers[name]
        if layer.dense:
            start[name] = torch.ones_like(values)
            continue
        ordered = values.sort(descending=True).values
        around = ordered[max(0, layer.rank - 1) : layer.rank + 1].clamp(min=1e-38)
        cut = around.log().mean().exp()
        start[name] = 1 / (1 + (cut / values.clamp(min=1e-38)) ** SHARPNESS)
    return start
