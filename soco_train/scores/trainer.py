"""The score-training loop: KL to the dense model against a falling size, through SoCo's three phases.

One step: a batch → teacher logits (the same modules, dense) → KL and its gradient on θ and d → plus the gradients of
the size and of the polarisation → AdamW. The two extra gradients depend on θ alone and are scaled to the typical entry
of the KL gradient before being weighted [ours]: λ_d and λ_s mean the same for every model, and a controller moves λ_d
so that R̂ follows the schedule. Where every layer has a budget of its own, each has its own scale, λ_d and controller.
With `train.lr_factors` the components themselves learn in the same steps, on the KL alone [ours].
fp32 scores always. Any number of processes learns the same scores (parallel.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any, ClassVar

import torch

from soco_train import parallel
from soco_train.learn.divergence import divergence
from soco_train.learn.loop import Loop
from soco_train.learn.optimiser import warmup_cosine
from soco_train.learn.recompute import recomputing
from soco_train.modules.scored import ScoreBank, ScoredLinear, scored_model
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.scores.phases import Orders, PressureController, StoppingRules, Timetable
from soco_train.scores.size import SoftSize, polarisation, soft_gate
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import LayerScores, Scores

DEAD = 1e-3  # a score at or below it carries nothing


def train_spectrum(
    subject: Subject,
    train: TrainSettings,
    plan: PlanSettings,
    session: Session,
    start: Mapping[str, torch.Tensor] | None = None,
) -> Scores:
    """Learn the scores of all components; start: s₀ by layer, [k] each, or None for s ≡ 1.

    Continues from the checkpoint in the session's folder if there is one of this task. Raises DataError if the loss is
    not finite; the last checkpoint stays.
    """
    subject.model.eval()
    dtype = getattr(torch, train.factor_dtype)
    with (
        scored_model(subject.model, subject.linears, subject.spectra, dtype, train.lr_factors > 0) as layers,
        recomputing(subject.model, train.checkpoint_activations),
    ):
        bank = ScoreBank(layers, train.score_function, train.deviation)
        if start is not None:
            bank.set_scores(torch.cat([start[name] for name in bank.names]))
        parallel.agree(bank.parameters())  # a start measured on several GPUs may differ in its last bits
        training = ScoreTraining(subject, train, plan, replace(session, seed=train.seed), bank, layers)
        training.run()
        training.save()
        return training.scores()


class ScoreTraining(Loop):
    """The state of one training of scores and its step."""

    kind: ClassVar[str] = "training"
    stage: ClassVar[str] = "train"
    rate: ClassVar[str] = "train.lr"

    def __init__(
        self,
        subject: Subject,
        train: TrainSettings,
        plan: PlanSettings,
        session: Session,
        bank: ScoreBank,
        layers: Mapping[str, ScoredLinear],
    ) -> None:
        self.model, self.train, self.plan, self.bank = subject.model, train, plan, bank
        groups: list[dict[str, Any]] = [{"params": [bank.theta], "lr": train.lr}]
        if bank.deviation is not None:
            groups.append({"params": [bank.deviation], "lr": train.lr_deviation})
        self.layers = layers
        factors = {
            f"{name}:{part}": value
            for name, layer in layers.items()
            for part, value in layer.named_parameters("", False)
        }
        if factors:
            groups.append({"params": list(factors.values()), "lr": train.lr_factors})
        optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        learnt = {**dict(bank.named_parameters()), **factors}
        super().__init__(session, train, subject.tokens, learnt, [optimiser])
        self.shapes = [(layer.dense.out_features, layer.dense.in_features) for layer in layers.values()]
        self.size = SoftSize(self.shapes, bank.ranks, plan, train.deviation, self.device)
        self.timetable = Timetable.preset(train)
        self.rules = StoppingRules()
        self.controllers = [PressureController() for _ in self.size.shares]
        self.restricted = False
        self.died = torch.full_like(bank.theta.detach(), math.inf)
        self.start_size = float(self.size.whole(self.size(self._gates(train.temperature[0]))).detach())
        self.resume()

    @property
    def steps(self) -> int:
        """Steps in all: fewer once the stopping rules have ended a phase."""
        return self.timetable.steps

    def layer_at(self, parameter: str, index: int) -> str:
        """Return the layer to which a score or an entry of the deviation belongs."""
        if ":" in parameter:
            return parameter.rpartition(":")[0]
        counts = self.bank.ranks if parameter == "theta" else self.bank.rows
        return next(name for name, end in zip(self.bank.names, accumulate(counts), strict=True) if index < end)

    def _gates(self, temperature: float) -> torch.Tensor:
        return soft_gate(self.bank.scores(), self.train.threshold, temperature)

    def one_step(self) -> None:
        """Take a step: KL, size, polarisation; project; note who died."""
        orders = self.timetable.orders(self.step, self.train, self.start_size, self.plan.keep_params)
        if orders.frozen and not self.restricted:
            self._freeze_support()
        kl = self._backward_divergence()
        soft = self._add_pressures(orders)
        self.clip()
        self.update(self._learning_rate())
        self.bank.project()
        ratio = self._after_step(orders)
        self.step += 1
        self.report({"phase": orders.phase, "kl": kl, "soft": soft, "hard": ratio})

    def _learning_rate(self) -> float:
        """Return the factor of this step: warm-up, then 1 while there is something to decide, then down to 0.1."""
        finish = self.timetable.freeze
        if self.step < finish:
            return min(1.0, (self.step + 1) / max(1.0, self.timetable.steps * self.train.warmup))
        return warmup_cosine(self.step - finish, self.timetable.steps - finish, 0.0)

    def _backward_divergence(self) -> float:
        """Leave the gradient of L_inc on θ and d, averaged over processes; return the KL in nats per token."""
        tokens, weight = self.own_part()
        with self.bank.teacher():
            teacher = self.model(input_ids=tokens, use_cache=False).logits
        self.bank.install()
        student = self.model(input_ids=tokens, use_cache=False).logits
        loss, _ = divergence(student, teacher, tokens, chunk=self.train.logit_chunk)
        return self.backward(loss, loss, weight)

    def _add_pressures(self, orders: Orders) -> float:
        """Add the gradients of L_dec and L_sp to θ.grad; return the soft size R̂ of all layers."""
        sizes = self.size(self._gates(orders.temperature))
        soft = self.size.whole(sizes)
        value = float(soft.detach())
        weights = self._size_weights(sizes.tolist(), orders.target)
        if orders.frozen:
            return value
        theta = self.bank.theta
        assert theta.grad is not None
        inc = theta.grad.clone()
        (smaller,) = torch.autograd.grad(soft, theta)
        parts = (gradient.split(self.size.spans) for gradient in (theta.grad, inc, smaller))
        for weight, total, own, pull in zip(weights, *parts, strict=True):
            total += weight * _scaled(pull, own)
        if orders.polarise > 0:
            (decided,) = torch.autograd.grad(polarisation(self.bank.scores()), theta)
            theta.grad += orders.polarise * _scaled(decided, inc)
        return value

    def _size_weights(self, sizes: list[float], target: float) -> list[float]:
        """Return λ_d of each budget: 0 where its size, as it will be, is within the target."""
        return [
            self.train.size_weight * controller.weight if controller.observe(size, target) > 0 else 0.0
            for controller, size in zip(self.controllers, sizes, strict=True)
        ]

    def _after_step(self, orders: Orders) -> float:
        """Note deaths, apply the stopping rules; return the hard size of the current support, in its fullest budget."""
        s = self.bank.scores().detach()
        threshold = self.train.threshold
        self.died = torch.where(s > DEAD, math.inf, torch.where(self.died.isinf(), float(self.step), self.died))
        ratio = float(self.size((s > threshold).float()).max())
        schedule = self.train.schedule
        limit = self.plan.keep_params * (1 + schedule.overshoot)
        if schedule.stop_early and not orders.frozen and self.rules.done(orders, ratio, limit, s, threshold):
            self.timetable.end_phase(self.step)
        return ratio

    def _freeze_support(self) -> None:
        """Cut to exactly R by the scores of now; only survivors train on, and the rest is dropped physically."""
        scores = self.scores()
        masks = []
        for name, layer in plan_ranks(scores, self.plan).layers.items():
            importance = scores.layers[name].importance
            mask = torch.full_like(importance, layer.dense, dtype=torch.bool)
            mask[kept(importance, layer.rank)] = True
            masks.append(mask)
        self.bank.restrict(torch.cat(masks).to(self.device))
        self.restricted = True

    def scores(self) -> Scores:
        """Read the scores off: survivors by s; the dead below them, the later their death the higher.

        A component outside the final support has the scale 1: a larger size that brings it back needs it as it was, not
        as polarisation left it.
        """
        s = self.bank.function(self.bank.theta.detach())
        age = self.died.clamp(max=float(self.train.steps)) / max(1, self.train.steps)
        order = torch.where(s > DEAD, s + 1.0, age)
        importance = torch.where(self.bank.support, order + self.restricted * 4.0, order)
        deviations: Mapping[str, torch.Tensor] = {}
        if self.bank.deviation is not None:
            deviations = dict(zip(self.bank.names, self.bank.deviation.detach().split(self.bank.rows), strict=True))
        scales = self.bank.per_layer(torch.where(self.bank.support, s, 1.0))
        layers = {
            name: LayerScores(
                part.cpu(),
                scales[name].cpu(),
                deviations[name].cpu() if deviations else None,
                shape,
                components=self._components(name),
            )
            for (name, part), shape in zip(self.bank.per_layer(importance).items(), self.shapes, strict=True)
        }
        return Scores(layers, {"scorer": "soco", "steps": self.step, "train": self.train.model_dump(mode="json")})

    def _components(self, name: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return the P and B that a layer has learnt, None where they are frozen."""
        learnt = dict(self.layers[name].named_parameters(recurse=False))
        return (learnt["P"].detach().cpu().clone(), learnt["B"].detach().cpu().clone()) if learnt else None

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return support, deaths, controllers, timetable and stopping rules."""
        tensors = {"support": self.bank.support, "died": self.died}
        if self.rules.peak is not None:
            tensors["peak"] = self.rules.peak
        return tensors, {
            "controllers": [vars(controller) for controller in self.controllers],
            "restricted": self.restricted,
            "timetable": vars(self.timetable),
            "rules": self.rules.state(),
        }

    def restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.died = tensors["died"].to(self.device)
        self.controllers = [PressureController(**state) for state in header["controllers"]]
        self.timetable = Timetable(**header["timetable"])
        peak = tensors.get("peak")
        self.rules = StoppingRules(**header["rules"], peak=None if peak is None else peak.to(self.device))
        if header["restricted"]:
            self.bank.restrict(tensors["support"].to(self.device))
            self.restricted = True


def _typical(gradient: torch.Tensor) -> torch.Tensor:
    """Return the median magnitude of the entries that are not zero: few components carry most of the norm."""
    moving = gradient[gradient != 0].abs()
    return moving.median() if moving.numel() else gradient.new_zeros(())


def _scaled(gradient: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Return `gradient` scaled so that its typical entry is that of `like`."""
    return gradient * (_typical(like) / _typical(gradient).clamp(min=1e-30))
