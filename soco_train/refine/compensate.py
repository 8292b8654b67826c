"""Closed-form compensation: a layer's surviving scores answer for the removed ones (optimal brain surgeon in σ-space).

With H the empirical Fisher information of a layer's scores, the second-order cost of removing the components C is least
when the survivors S move by

    δs_S = (H_SS + ridge · mean diag H_SS · I)⁻¹ H_SC s_C

H = E[g gᵀ] is summed position by position, g_i = h_i z_i with h = Pᵀ δ: as many samples as calibration tokens, for k
scores. In a whitened basis z is white and H nearly diagonal, so there is little to compensate; in the plain basis there
is. Survivors stay in [0, `ceiling`].

Only for scores that were not trained: trained survivors have learnt to do without the removed components, which come
back at s = 1 for larger sizes. To let survivors answer for those once more would count them twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn

from soco_train.cost import DENSE_BYTES, Cost, ModelShape, Task, logits, saved_by_the_rest
from soco_train.events import Event, Notify, silent
from soco_train.learn.divergence import divergence
from soco_train.modules.scored import ScoreBank, ScoredLinear, scored_model
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import kept
from soco_train.refine.rungs import rung
from soco_train.settings.refine import CompensateSettings
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum

FISHER_AT_ONCE = 4 * 2**30  # bytes of the layers' H that are summed in one pass over the tokens
SKIPPED = "skipped: the scores were trained, their survivors do without the removed components already"


def compensate(
    subject: Subject, scores: Scores, plan: RankPlan, settings: CompensateSettings, notify: Notify = silent
) -> Scores:
    """Return `scores` with the scale of every survivor of `plan` compensated; importances stay as they are.

    Trained scores are returned as they are, with an event that says why.
    """
    if not all(map(_untrained, scores.layers.values())):
        notify(Event("compensate", 1, 1, {"": SKIPPED}))
        return scores
    layers = dict(scores.layers)
    chosen = [name for name, layer in plan.layers.items() if not layer.dense]
    tokens = subject.tokens[: settings.blocks]
    done = 0
    for group in _groups(plan, chosen):
        linears = {name: subject.linears[name] for name in group}
        fisher = score_fisher(subject.model, linears, subject.spectra, scores, tokens)
        for name in group:
            layer = layers[name]
            survivors = kept(layer.importance, plan.layers[name].rank)
            layers[name] = replace(layer, scale=compensated(layer.scale, survivors, fisher[name], settings))
        done += len(group)
        notify(Event("compensate", done, len(chosen)))
    return Scores(layers, {**scores.provenance, "compensated": settings.blocks})


def _untrained(layer: LayerScores) -> bool:
    """Return whether all components together are the dense layer."""
    added = (layer.deviation, layer.correction, layer.adapter, layer.components)
    return all(part is None for part in added) and bool((layer.scale == 1).all())


def compensated(
    scale: torch.Tensor, survivors: torch.Tensor, fisher: torch.Tensor, settings: CompensateSettings
) -> torch.Tensor:
    """Return s [k] with its survivors moved by the step above; `fisher`: H [k, k]."""
    removed = torch.ones_like(scale, dtype=torch.bool)
    removed[survivors] = False
    inner = fisher[survivors][:, survivors].double()
    inner.diagonal().add_(settings.ridge * (float(inner.diagonal().mean()) or 1.0))
    step = torch.linalg.solve(inner, fisher[survivors][:, removed].double() @ scale[removed].double())
    moved = scale.clone()
    moved[survivors] = (scale[survivors].double() + step).clamp(0, settings.ceiling).to(scale.dtype)
    return moved


def score_fisher(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    spectra: Mapping[str, Spectrum],
    scores: Scores,
    tokens: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return H = E[g gᵀ] [k, k] fp32 by layer at the present scores, over the positions of tokens [n, t].

    g is the gradient of a sequence's summed next-token cross entropy in the scores as one position uses them.
    """
    model.eval()
    with scored_model(model, linears, spectra, torch.float32) as layers:
        bank = _bank(layers, scores)
        with _products(layers) as sums:
            for sequence in tokens:
                sequence = sequence[None].to(bank.theta.device)
                bank.install()
                logits = model(input_ids=sequence, use_cache=False).logits
                loss, _ = divergence(logits, logits.detach(), sequence, ce_weight=float(sequence.numel()))
                loss.backward()
        return {name: (total / tokens.numel()).cpu() for name, total in sums.items()}


def _bank(layers: Mapping[str, ScoredLinear], scores: Scores) -> ScoreBank:
    """Return a bank that holds `scores`, deviations included."""
    own = [scores.layers[name] for name in layers]
    deviations = [layer.deviation for layer in own if layer.deviation is not None]
    bank = ScoreBank(layers, "relu", deviation=bool(deviations))
    bank.set_scores(torch.cat([layer.scale for layer in own]))
    if bank.deviation is not None:
        bank.deviation.data.copy_(torch.cat(deviations))
    return bank


@contextmanager
def _products(layers: Mapping[str, ScoredLinear]) -> Iterator[dict[str, torch.Tensor]]:
    """Within this context every backward pass adds Σ_t g_t g_tᵀ of each layer to the sums."""
    sums = {name: torch.zeros(2 * [layer.s.numel()], device=layer.P.device) for name, layer in layers.items()}

    def listen(name: str, layer: ScoredLinear, x: torch.Tensor, output: torch.Tensor) -> None:
        def add(delta: torch.Tensor) -> None:
            products = ((delta.to(layer.P) @ layer.P) * (x.detach().to(layer.B) @ layer.B.T)).flatten(0, -2)
            sums[name] += products.T @ products

        output.register_hook(add)

    handles = [
        layer.register_forward_hook(lambda module, args, output, name=name: listen(name, module, args[0], output))
        for name, layer in layers.items()
    ]
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _groups(plan: RankPlan, names: list[str]) -> Iterator[list[str]]:
    """Cut the layers into groups whose H [k, k] fit into memory together; each group is a pass over the tokens."""
    group: list[str] = []
    used = 0
    for name in names:
        size = 4 * min(plan.layers[name].shape) ** 2
        if group and used + size > FISHER_AT_ONCE:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    if group:
        yield group


def compensation_cost(task: Task, shape: ModelShape, width: int) -> Cost | None:
    """Return the cost of a pass forward and backward for each group of layers, and their products over all tokens.

    Some layers at a time have their factors in fp32 and the Fisher matrices of their scores in memory.
    """
    if task.trained:  # it is skipped
        return None
    block, fisher = task.data.block, sum(DENSE_BYTES * min(pair) ** 2 for pair in shape.linears)
    passes = math.ceil(fisher / FISHER_AT_ONCE)
    scored = DENSE_BYTES * int((shape.full_factors + block * shape.components) / passes)
    memory = width * shape.parameters + scored + min(FISHER_AT_ONCE, fisher)
    memory += block * saved_by_the_rest(shape, width) + logits(block, shape, block, width)
    tokens = 2.0 * task.refine.compensate.blocks * block
    flops: dict[str, float] = {task.train.factor_dtype: 2 * tokens * passes * shape.active}
    flops["float32"] = flops.get("float32", 0) + tokens * fisher / DENSE_BYTES
    return Cost(memory, flops=flops, phase="compensation")


@rung("compensate", on="scores", switch="blocks", cost=compensation_cost)
def _compensate(
    subject: Subject, scores: Scores, plan: RankPlan, settings: CompensateSettings, session: Session
) -> Scores:
    return compensate(subject, scores, plan, settings, session.notify)
