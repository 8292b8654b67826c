"""Scores in closed form: no training, or one backward pass.

fisher           ½ E[g²] at the dense model: the second-order cost of removing a component
singular-values  σ²; with `allocation: uniform` on the whitened basis this is SVD-LLM's recipe
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from soco_train.events import Event, Notify, silent
from soco_train.learn.divergence import divergence
from soco_train.modules.scored import ScoreBank, scored_model
from soco_train.modules.subject import Session, Subject
from soco_train.scores.costs import saliency_cost
from soco_train.scores.registry import scorer
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import LayerScores, Scores


@scorer("singular-values")
def singular_values(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Score a component by its energy σ² in the chosen basis."""
    return untrained(subject, train, energy(subject))


@scorer("fisher", reads=("fisher_blocks", "logit_chunk"), cost=saliency_cost)
def fisher(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Score a component by ½ E[g²], g the gradient of a sequence's cross entropy in its score at s ≡ 1."""
    return untrained(subject, train, saliency(subject, train, session.notify))


def saliency(subject: Subject, train: TrainSettings, notify: Notify = silent) -> dict[str, torch.Tensor]:
    """Return ½ E[g²] by layer, [k] fp32 each, over `fisher_blocks` sequences. Ours.

    Gradients are those of the summed next-token cross entropy of one sequence, per token of it.
    """
    tokens = subject.tokens[: train.fisher_blocks]
    subject.model.eval()
    with scored_model(subject.model, subject.linears, subject.spectra, getattr(torch, train.factor_dtype)) as layers:
        bank = ScoreBank(layers, "relu", deviation=False)
        total = torch.zeros_like(bank.theta.detach())
        for number, sequence in enumerate(tokens, start=1):
            sequence = sequence[None].to(total.device)
            bank.install()
            logits = subject.model(input_ids=sequence, use_cache=False).logits
            loss, _ = divergence(logits, logits.detach(), sequence, ce_weight=1.0, chunk=train.logit_chunk)
            (gradient,) = torch.autograd.grad(loss, bank.theta)
            total += gradient**2
            notify(Event("fisher", number, len(tokens)))
        return {name: part.cpu() / (2 * len(tokens)) for name, part in bank.per_layer(total).items()}


def energy(subject: Subject) -> dict[str, torch.Tensor]:
    """Return σ² by layer, [k] fp32 each.

    In the two-sided basis that is, up to a factor, the second-order cost of removing a component, E[δᵀ p bᵀ x]² with
    inputs and output gradients taken as independent: a saliency without another backward pass.
    """
    return {name: subject.spectra[name].sigma.float() ** 2 for name in subject.linears}


def untrained(subject: Subject, train: TrainSettings, importance: Mapping[str, torch.Tensor]) -> Scores:
    """Return scores with these importances, [k] by layer, every scale 1 and no deviation."""
    layers = {
        name: LayerScores(
            importance[name].cpu(),
            torch.ones_like(importance[name]).cpu(),
            None,
            (linear.out_features, linear.in_features),
        )
        for name, linear in subject.linears.items()
    }
    return Scores(layers, {"scorer": train.scorer, "train": train.model_dump(mode="json")})
