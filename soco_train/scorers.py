"""Ways to score singular components, as plug-ins: a scorer is one decorated function from a ScoringTask to Scores.

soco             learn the scores in three phases (arXiv 2502.15092)
acip             learn binary masks under a growing l1 pressure, and adapters (arXiv 2502.01717)
fisher           ½ E[g²] at the dense model: the second-order cost of removing a component; no training
singular-values  σ², no training; with `allocation: uniform` on the whitened basis this is SVD-LLM's recipe
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from soco_train.acip import train_masks
from soco_train.artifacts import LayerScores, Scores, Spectrum
from soco_train.budget import plan_ranks
from soco_train.errors import RecipeError
from soco_train.events import Event, Notify, silent
from soco_train.objective import divergence
from soco_train.scored import ScoreBank, scored_model
from soco_train.settings import PlanSettings, TrainSettings
from soco_train.subject import Subject
from soco_train.trainer import DTYPES, TrainingTask, train_spectrum


@dataclass(frozen=True)
class ScoringTask(Subject):
    """What a scorer works on: a dense model, its participating Linears, their spectra and calibration blocks [n, t]."""

    train: TrainSettings
    plan: PlanSettings
    workdir: Path
    notify: Notify = field(default=silent)
    data_fingerprint: str = ""


SHARPNESS = 2.0

Scorer = Callable[[ScoringTask], Scores]
SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Register a scorer under the name that `train.scorer` uses."""

    def register(function: Scorer) -> Scorer:
        SCORERS[name] = function
        return function

    return register


def train_scores(task: ScoringTask) -> Scores:
    """Score every component of every participating layer with `task.train.scorer`.

    Returns Scores (importance, scale, deviation by layer). Raises RecipeError for an unknown scorer and DataError for a
    loss that is not finite. Resumes from `task.workdir` where the scorer trains.
    """
    return find_scorer(task.train.scorer)(task)


def find_scorer(name: str) -> Scorer:
    """Return a registered scorer; RecipeError for an unknown name."""
    if name not in SCORERS:
        raise RecipeError(f"unknown scorer {name!r}", fix=f"one of {', '.join(SCORERS)}", where="recipe: train.scorer")
    return SCORERS[name]


@scorer("singular-values")
def singular_values(task: ScoringTask) -> Scores:
    """Score a component by its energy σ² in the chosen basis."""
    return _untrained(task, energy(task))


@scorer("fisher")
def fisher(task: ScoringTask) -> Scores:
    """Score a component by ½ E[g²], g the gradient of a sequence's cross entropy in its score at s ≡ 1."""
    return _untrained(task, saliency(task))


@scorer("soco")
def soco(task: ScoringTask) -> Scores:
    """Learn the scores by SoCo's three phases, from s ≡ 1 or from a closed-form warm start."""
    task = _sized(task)
    start = None if task.train.start == "ones" else wiener_start(task, START_SALIENCIES[task.train.start](task))
    return attributed(train_spectrum(_training(task, start)), task.spectra, task.train)


@scorer("acip")
def acip(task: ScoringTask) -> Scores:
    """Learn masks and adapters as ACIP does: the control whose components die under l1 pressure."""
    return train_masks(_training(_sized(task), None))


def _sized(task: ScoringTask) -> ScoringTask:
    """Return the task at the size the scores are trained for."""
    if task.train.keep_params is None:
        return task
    return replace(task, plan=task.plan.model_copy(update={"keep_params": task.train.keep_params}))


def _training(task: ScoringTask, start: Mapping[str, torch.Tensor] | None) -> TrainingTask:
    return TrainingTask(
        model=task.model,
        linears=task.linears,
        spectra=task.spectra,
        tokens=task.tokens,
        train=task.train,
        plan=task.plan,
        workdir=task.workdir,
        notify=task.notify,
        fingerprint=_fingerprint(task),
        start=start,
    )


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


def saliency(task: ScoringTask) -> dict[str, torch.Tensor]:
    """Return ½ E[g²] by layer, [k] fp32 each, over `fisher_blocks` sequences. Ours.

    Gradients are those of the summed next-token cross entropy of one sequence, per token of it.
    """
    tokens = task.tokens[: task.train.fisher_blocks]
    task.model.eval()
    with scored_model(task.model, task.linears, task.spectra, DTYPES[task.train.factor_dtype]) as layers:
        bank = ScoreBank(layers, "relu", deviation=False)
        total = torch.zeros_like(bank.theta.detach())
        for number, sequence in enumerate(tokens, start=1):
            sequence = sequence[None].to(total.device)
            bank.install()
            logits = task.model(input_ids=sequence, use_cache=False).logits
            loss, _ = divergence(logits, logits.detach(), sequence, ce_weight=1.0, chunk=task.train.logit_chunk)
            (gradient,) = torch.autograd.grad(loss, bank.theta)
            total += gradient**2
            task.notify(Event("fisher", number, len(tokens)))
        return {name: part.cpu() / (2 * len(tokens)) for name, part in bank.per_layer(total).items()}


def energy(task: ScoringTask) -> dict[str, torch.Tensor]:
    """Return σ² by layer, [k] fp32 each.

    In the two-sided basis that is, up to a factor, the second-order cost of removing a component, E[δᵀ p bᵀ x]² with
    inputs and output gradients taken as independent: a saliency without another backward pass.
    """
    return {name: task.spectra[name].sigma.float() ** 2 for name in task.linears}


START_SALIENCIES = {"fisher": saliency, "spectrum": energy}


def wiener_start(task: ScoringTask, importance: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return s₀ = f² / (f² + c²) by layer: f the saliency, c the saliency at which the budget would cut that layer.

    Ours: replaces most of phase 1. At f = c a component starts undecided (s = ½), far above near 1, far below near 0,
    in the order of saliency. A layer that the budget leaves dense starts at s ≡ 1.
    """
    settings = task.plan
    if settings.allocation != "uniform":  # equal shares are not the saliency's to give out
        settings = settings.model_copy(update={"allocation": "lagrangian"})
    plan = plan_ranks(_untrained(task, importance), settings)
    start = {}
    for name, values in importance.items():
        layer = plan.layers[name]
        if layer.dense:
            start[name] = torch.ones_like(values)
            continue
        ordered = values.sort(descending=True).values
        around = ordered[max(0, layer.rank - 1) : layer.rank + 1].clamp(min=1e-38)
        cut = around.log().mean().exp()
        start[name] = 1 / (1 + (cut / values.clamp(min=1e-38)) ** SHARPNESS)
    return start


def _untrained(task: ScoringTask, importance: Mapping[str, torch.Tensor]) -> Scores:
    layers = {
        name: LayerScores(
            importance[name].cpu(),
            torch.ones_like(importance[name]).cpu(),
            None,
            (linear.out_features, linear.in_features),
        )
        for name, linear in task.linears.items()
    }
    return Scores(layers, {"scorer": task.train.scorer, "train": task.train.model_dump(mode="json")})


def _fingerprint(task: ScoringTask) -> str:
    """Name this task: settings, plan, data and layers; a checkpoint of another task must not be continued."""
    shapes = {name: list(linear.weight.shape) for name, linear in task.linears.items()}
    settings = [
        task.train.model_dump(mode="json", exclude={"checkpoint_every"}),
        task.plan.model_dump(mode="json"),
        shapes,
    ]
    return hashlib.sha256(json.dumps([*settings, task.data_fingerprint], sort_keys=True).encode()).hexdigest()
