"""ACIP's rule as a scorer: binary masks over singular components under a growing l1 pressure, with LoRA beside them.

    y = P (1[p > 0] ⊙ B x) + α C A x + bias        L = CE + λ_t Σ relu(p)

Published (arXiv 2502.01717 and its code): the mask is binary in the forward pass and passes gradients straight through
to p, p starts at 1/√k and stays dead once it is 0; λ_t grows geometrically; masks and adapters learn together, on cross
entropy; when the size is reached the masks stop and the adapters go on alone; who died later ranks higher, survivors
rank by p; the basis is the plain SVD.

Ours, so that it fits the same few tokens as every other method here: λ is measured in the typical gradient of the first
step and grows by the step count and not by 1 % in 4 steps; the masks stop after 70 % of the steps at the latest; the
learning rates; rank 8; no dropout; and the adapter's parameters count: its ranks are taken from those that the plan
gives a layer. With `train.acip.adapter: merged` LoRA works on the inner factor instead: B + α C A has the rank that the
support leaves it, so the adapter costs no parameter at any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from soco_train import parallel
from soco_train.learn.divergence import divergence
from soco_train.learn.loop import Loop
from soco_train.learn.recompute import recomputing
from soco_train.modules.layers import substituted
from soco_train.modules.masked import ADAPTER_SCALE, MaskedLinear
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.scores.costs import learning_cost
from soco_train.scores.registry import scorer
from soco_train.scores.size import SoftSize
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import LayerScores, Scores

PRESSURE = (0.1, 100.0)  # λ in typical gradients: at the first step, and when the masks must stop
MASKS_STOP = 0.7  # of all steps


READS = "acip steps batch_tokens lr lr_deviation clip checkpoint_every checkpoint_activations logit_chunk"


@scorer("acip", reads=READS.split(), trains=True, cost=learning_cost)
def acip(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Learn masks and adapters as ACIP does: the control whose components die under l1 pressure."""
    seeds = {name: train.seed * 1_000_003 + number for number, name in enumerate(subject.linears)}
    dtype, beside = getattr(torch, train.factor_dtype), train.acip.adapter == "beside"
    subject.model.eval()
    with (
        substituted(
            subject.model,
            subject.linears,
            lambda name, linear: MaskedLinear(linear, subject.spectra[name], dtype, seeds[name], beside),
        ) as layers,
        recomputing(subject.model, train.checkpoint_activations),
    ):
        masks = _Masks(subject, train, plan, replace(session, seed=train.seed), layers)
        masks.run()
        masks.save()
        return masks.scores()


class _Masks(Loop):
    """The state of one training of masks and adapters, and its step."""

    kind: ClassVar[str] = "masks"
    stage: ClassVar[str] = "train"
    rate: ClassVar[str] = "train.lr"

    def __init__(
        self,
        subject: Subject,
        train: TrainSettings,
        plan: PlanSettings,
        session: Session,
        layers: Mapping[str, MaskedLinear],
    ) -> None:
        self.model, self.train, self.plan, self.layers = subject.model, train, plan, layers
        self.shapes = [(layer.dense.out_features, layer.dense.in_features) for layer in layers.values()]
        self.masks: list[torch.Tensor] = [layer.p for layer in layers.values()]
        parameters = {f"{name}:{part}": p for name, x in layers.items() for part, p in _trained(x).items()}
        adapters = [p for name, p in parameters.items() if not name.endswith(":p")]
        groups: list[dict[str, Any]] = [
            {"params": self.masks, "lr": train.lr},
            {"params": adapters, "lr": train.lr_deviation},
        ]
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        super().__init__(session, train, subject.tokens, parameters, [optimiser])
        ranks = [p.numel() for p in self.masks]
        self.size = SoftSize(self.shapes, ranks, plan, False, self.device)
        beside = sum(x.adapter_rank * (m + n) for x, (m, n) in zip(layers.values(), self.shapes, strict=True))
        self.beside = beside / sum(m * n for m, n in self.shapes)
        self.died = torch.full((sum(ranks),), math.inf, device=self.device)
        self.frozen, self.unit = False, math.nan
        self.resume()
        parallel.agree(self.parameters.values())

    @property
    def steps(self) -> int:
        """Steps in all."""
        return self.train.steps

    def one_step(self) -> None:
        """Take a step: cross entropy, pressure; note who died."""
        ratio = float(self.size.whole(self.size((torch.cat(self.masks) > 0).float())))
        if not self.frozen and (ratio + self.beside <= self.plan.keep_params or self.step >= MASKS_STOP * self.steps):
            self._freeze()
        tokens, weight = self.own_part()
        logits = self.model(input_ids=tokens, use_cache=False).logits
        # against itself the divergence is nothing: what is left is the cross entropy
        loss, _ = divergence(logits, logits.detach(), tokens, ce_weight=1.0, chunk=self.train.logit_chunk)
        value = self.backward(loss, loss, weight)
        self.clip()
        self._press()
        self.update()
        self.step += 1
        if not self.frozen:
            self._bury(torch.cat(self.masks) <= 0, self.step)
        self.report({"loss": value, "hard": ratio})

    def _press(self) -> None:
        """Add λ_t, the gradient of the l1 term, to every mask that is alive."""
        if self.frozen:
            for p in self.masks:
                p.grad = None
            return
        if math.isnan(self.unit):
            self.unit = float(torch.cat([_gradient(p) for p in self.masks]).abs().median())
        first, last = PRESSURE
        progress = self.step / max(1.0, MASKS_STOP * self.train.steps)
        pressure = self.unit * first * (last / first) ** progress
        for p in self.masks:
            p.grad = _gradient(p) + pressure * (p > 0)

    def _bury(self, dead: torch.Tensor, step: int) -> None:
        """Note the step of those [components] that are dead and were not before."""
        self.died = torch.where(dead & self.died.isinf(), float(step), self.died)

    def _freeze(self) -> None:
        """Fix the masks at the support that the plan will cut; layers it leaves dense answer as such from now on.

        An adapter beside the layer takes the ranks of the last that the plan keeps: their masks close, they do not die.
        """
        scores, self.frozen, seats = self.scores(), True, []
        for name, planned in plan_ranks(scores, self.plan).layers.items():
            layer = self.layers[name]
            layer.left_dense = planned.dense
            support = torch.zeros_like(layer.p, dtype=torch.bool)
            ranks = kept(scores.layers[name].importance, planned.rank)
            components = kept(scores.layers[name].importance, max(0, planned.rank - layer.adapter_rank))
            support[components.to(self.device)] = True
            seats.append(torch.zeros_like(support).index_fill(0, ranks.to(self.device), True) & ~support)
            layer.p.data.copy_(torch.where(support, layer.p.clamp(min=1e-6), layer.p.clamp(max=0)))
            layer.p.requires_grad_(False)
        self._bury((torch.cat(self.masks) <= 0) & ~torch.cat(seats), self.step + 1)

    def scores(self) -> Scores:
        """Read the scores off: survivors by p, above all the dead, who rank the higher the later they died."""
        found = {}
        died = self.died.clamp(max=float(self.train.steps)) / max(1, self.train.steps)
        parts = died.split([p.numel() for p in self.masks])
        for (name, layer), order, shape in zip(self.layers.items(), parts, self.shapes, strict=True):
            p = layer.p.detach()
            adapter = ((ADAPTER_SCALE * layer.C.detach()).cpu(), layer.A.detach().cpu())
            where = {"adapter" if layer.beside else "correction": adapter}
            importance = torch.where(p > 0, p + 1.0, order.to(p)).cpu()
            found[name] = LayerScores(importance, torch.ones_like(importance), None, shape, **where)
        return Scores(found, {"scorer": "acip", "steps": self.step, "train": self.train.model_dump(mode="json")})

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return deaths, the unit of pressure, and whether the masks are fixed and to what."""
        left_dense = [name for name, layer in self.layers.items() if layer.left_dense]
        return {"died": self.died}, {"frozen": self.frozen, "unit": self.unit, "left_dense": left_dense}

    def restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.died = tensors["died"].to(self.device)
        self.frozen, self.unit = header["frozen"], header["unit"]
        for name, layer in self.layers.items():
            layer.left_dense = name in header["left_dense"]
            layer.p.requires_grad_(not self.frozen)


def _trained(layer: MaskedLinear) -> dict[str, nn.Parameter]:
    return {"p": layer.p, "C": layer.C, "A": layer.A}


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
