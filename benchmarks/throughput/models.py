"""The model three times with the same weights: dense, with every component scored, and cut to a size.

The components are a rotation of the weight (P = W Q, B = Qᵀ): how long a product takes does not depend on what is in
it, and so nothing has to be decomposed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from soco_train.learn.divergence import divergence
from soco_train.modules.layers import replace_module, select_linears
from soco_train.modules.scored import ScoreBank, ScoredLinear
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum


@dataclass
class Subject:
    """A model that passes tokens forward and a loss backward, to its scores if it has any."""

    model: Any
    bank: ScoreBank | None = None

    def teach(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits without gradients: what a training step asks of the dense model."""
        with torch.no_grad():
            return self.model(input_ids=tokens, use_cache=False).logits

    def learn(self, tokens: torch.Tensor, teacher: torch.Tensor) -> None:
        """Pass `tokens` forward and the divergence from `teacher` backward, as a training step does."""
        embedded = self.model.get_input_embeddings()(tokens).detach().requires_grad_(self.bank is None)
        if self.bank is not None:
            self.bank.install()
        logits = self.model(inputs_embeds=embedded, use_cache=False).logits
        loss, _ = divergence(logits, teacher, tokens)
        loss.backward()
        if self.bank is not None:
            self.bank.zero_grad(set_to_none=True)


def rotation(linear: nn.Linear) -> Spectrum:
    """Return min(m, n) components whose sum is the weight [m, n]."""
    weight = linear.weight.detach().float().cpu()
    k = min(weight.shape)
    turn = torch.linalg.qr(torch.randn(k, k, generator=torch.Generator().manual_seed(k))).Q
    tall = weight.shape[0] >= weight.shape[1]
    P, B = (weight @ turn, turn.T) if tall else (turn, turn.T @ weight)
    return Spectrum(P, B, torch.ones(k))


def subjects(model: Any, dtype: torch.dtype, settings: PlanSettings) -> tuple[dict[str, Subject], RankPlan]:
    """Return the three models by name, and the plan that the last one is cut to."""
    model.eval().requires_grad_(False)
    found = {"dense": Subject(model), "full": _scored(model, dtype), "cut": _scored(model, dtype)}
    plan = plan_ranks(_random_scores(select_linears(model, LayerSettings())), settings)
    bank = found["cut"].bank
    assert bank is not None
    masks = [
        kept(torch.arange(k, 0, -1), plan.layers[name].rank) for name, k in zip(bank.names, bank.ranks, strict=True)
    ]
    support = [
        torch.zeros(k, dtype=torch.bool).index_fill(0, mask, True) for k, mask in zip(bank.ranks, masks, strict=True)
    ]
    bank.restrict(torch.cat(support).to(bank.theta.device))
    return found, plan


def _scored(model: Any, dtype: torch.dtype) -> Subject:
    twin = copy.deepcopy(model)
    layers = {}
    for name, linear in select_linears(twin, LayerSettings()).items():
        layers[name] = ScoredLinear(linear, rotation(linear), dtype)
        replace_module(twin, name, layers[name])
    return Subject(twin, ScoreBank(layers, "relu", deviation=True))


def _random_scores(linears: Mapping[str, nn.Linear]) -> Scores:
    layers = {}
    for name, linear in linears.items():
        importance = torch.arange(min(linear.weight.shape), 0, -1).float()
        shape = (linear.out_features, linear.in_features)
        layers[name] = LayerScores(importance, torch.ones_like(importance), torch.zeros(shape[0]), shape)
    return Scores(layers, {})
