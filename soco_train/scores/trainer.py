"""The score-training loop: KL to the dense model against a falling size, through SoCo's three phases.

One step: a batch → teacher logits (the same modules, dense) → KL and its gradient on θ and d → plus the gradients of
the size and of the polarisation → AdamW. The two extra gradients depend on θ alone and are scaled to the typical entry
of the KL gradient before being weighted [ours]: λ_d and λ_s mean the same for every model, and a controller moves λ_d
so that R̂ follows the schedule. Where every layer has a budget of its own, each has its own scale, λ_d and controller.
fp32 scores always. Any number of processes learns the same scores (parallel.py).
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import torch

from soco_train import parallel
from soco_train.data.batches import batch
from soco_train.errors import DataError
from soco_train.events import Event
from soco_train.learn.divergence import divergence
from soco_train.learn.optimiser import pack, unpack, warmup_cosine
from soco_train.learn.recompute import recomputing
from soco_train.modules.scored import ScoreBank, ScoredLinear, scored_model
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.scores.phases import Orders, PressureController, StoppingRules, Timetable
from soco_train.scores.size import SoftSize, polarisation, soft_gate
from soco_train.scores.task import DTYPES, TrainingTask
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.tensorfile import read_tensors, write_tensors

CHECKPOINT = "training.safetensors"
DEAD = 1e-3  # a score at or below it carries nothing


def train_spectrum(task: TrainingTask) -> Scores:
    """Learn the scores of all components; continues from the checkpoint in `workdir` if there is one of this task.

    Raises DataError if the loss is not finite; the last checkpoint stays.
    """
    task.model.eval()
    dtype = DTYPES[task.train.factor_dtype]
    with (
        scored_model(task.model, task.linears, task.spectra, dtype) as layers,
        recomputing(task.model, task.train.checkpoint_activations),
    ):
        return _Run(task, layers).finish()


class _Run:
    """The state of one training run and its step."""

    def __init__(self, task: TrainingTask, layers: Mapping[str, ScoredLinear]) -> None:
        self.task = task
        train = task.train
        self.bank = ScoreBank(layers, train.score_function, train.deviation)
        if task.start is not None:
            self.bank.set_scores(torch.cat([task.start[name] for name in self.bank.names]))
        parallel.agree(self.bank.parameters())  # a start measured on several GPUs may differ in its last bits
        self.shapes = [(layer.dense.out_features, layer.dense.in_features) for layer in layers.values()]
        self.device = self.bank.theta.device
        self.size = SoftSize(self.shapes, self.bank.ranks, task.plan, train.deviation, self.device)
        groups: list[dict[str, Any]] = [{"params": [self.bank.theta], "peak": train.lr}]
        if self.bank.deviation is not None:
            groups.append({"params": [self.bank.deviation], "peak": train.lr_deviation})
        self.optimiser = torch.optim.AdamW(groups, lr=train.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.timetable = Timetable.preset(train)
        self.rules = StoppingRules()
        self.step = 0
        self.controllers = [PressureController() for _ in self.size.shares]
        self.restricted = False
        self.died = torch.full_like(self.bank.theta.detach(), math.inf)
        self.start_size = float(self.size.whole(self.size(self._gates(train.temperature[0]))).detach())
        self.started, self.tokens_done = time.monotonic(), 0
        self._resume()

    def finish(self) -> Scores:
        """Run the remaining steps and return the scores."""
        while self.step < self.timetable.steps:
            self._one_step()
            if self.step % self.task.train.checkpoint_every == 0:
                self._save()
        self._save()
        return self._scores()

    def _gates(self, temperature: float) -> torch.Tensor:
        return soft_gate(self.bank.scores(), self.task.train.threshold, temperature)

    def _one_step(self) -> None:
        train, keep = self.task.train, self.task.plan.keep_params
        orders = self.timetable.orders(self.step, train, self.start_size, keep)
        if orders.frozen and not self.restricted:
            self._freeze_support()
        kl = self._backward_divergence()
        soft = self._add_pressures(orders)
        torch.nn.utils.clip_grad_norm_(self.bank.parameters(), train.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * self._learning_rate()
        self.optimiser.step()
        self.bank.project()
        self.optimiser.zero_grad(set_to_none=True)
        ratio = self._after_step(orders)
        self.step += 1
        self._report(orders, kl, soft, ratio)

    def _learning_rate(self) -> float:
        """Return the factor of this step: warm-up, then 1 while there is something to decide, then down to 0.1."""
        train, finish = self.task.train, self.timetable.freeze
        if self.step < finish:
            return min(1.0, (self.step + 1) / max(1.0, self.timetable.steps * train.warmup))
        return warmup_cosine(self.step - finish, self.timetable.steps - finish, 0.0)

    def _backward_divergence(self) -> float:
        """Leave the gradient of L_inc on θ and d, averaged over processes; return the KL in nats per token."""
        sequences = batch(self.task.tokens, self.task.train.batch_tokens, self.step, self.task.train.seed)
        self.tokens_done += sequences.numel()
        own, weight = parallel.share(sequences)
        tokens = own.to(self.device)
        with self.bank.teacher():
            teacher = self.task.model(input_ids=tokens, use_cache=False).logits
        self.bank.install()
        student = self.task.model(input_ids=tokens, use_cache=False).logits
        loss, _ = divergence(student, teacher, tokens, chunk=self.task.train.logit_chunk)
        loss.backward()
        kl = parallel.combine(loss.detach(), weight)
        parallel.combine_gradients(self.bank.parameters(), weight)
        if not math.isfinite(float(kl)):
            raise DataError(
                f"the loss is {float(kl)} at step {self.step}",
                fix="lower train.lr, and check that the dense model gives finite logits; the last checkpoint is kept",
                where=str(self.task.workdir / CHECKPOINT),
            )
        return float(kl)

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
            self.task.train.size_weight * controller.weight if controller.observe(size, target) > 0 else 0.0
            for controller, size in zip(self.controllers, sizes, strict=True)
        ]

    def _after_step(self, orders: Orders) -> float:
        """Note deaths, apply the stopping rules; return the hard size of the current support, in its fullest budget."""
        s = self.bank.scores().detach()
        threshold = self.task.train.threshold
        self.died = torch.where(s > DEAD, math.inf, torch.where(self.died.isinf(), float(self.step), self.died))
        ratio = float(self.size((s > threshold).float()).max())
        schedule = self.task.train.schedule
        limit = self.task.plan.keep_params * (1 + schedule.overshoot)
        if schedule.stop_early and not orders.frozen and self.rules.done(orders, ratio, limit, s, threshold):
            self.timetable.end_phase(self.step)
        return ratio

    def _freeze_support(self) -> None:
        """Cut to exactly R by the scores of now; only survivors train on, and the rest is dropped physically."""
        scores = self._scores()
        masks = []
        for name, layer in plan_ranks(scores, self.task.plan).layers.items():
            importance = scores.layers[name].importance
            mask = torch.full_like(importance, layer.dense, dtype=torch.bool)
            mask[kept(importance, layer.rank)] = True
            masks.append(mask)
        self.bank.restrict(torch.cat(masks).to(self.device))
        self.restricted = True

    def _scores(self) -> Scores:
        """Read the scores off: survivors by s; the dead below them, the later their death the higher.

        A component outside the final support has the scale 1: a larger size that brings it back needs it as it was, not
        as polarisation left it.
        """
        s = self.bank.function(self.bank.theta.detach())
        age = self.died.clamp(max=float(self.task.train.steps)) / max(1, self.task.train.steps)
        order = torch.where(s > DEAD, s + 1.0, age)
        importance = torch.where(self.bank.support, order + self.restricted * 4.0, order)
        deviations: Mapping[str, torch.Tensor] = {}
        if self.bank.deviation is not None:
            deviations = dict(zip(self.bank.names, self.bank.deviation.detach().split(self.bank.rows), strict=True))
        scales = self.bank.per_layer(torch.where(self.bank.support, s, 1.0))
        layers = {
            name: LayerScores(part.cpu(), scales[name].cpu(), deviations[name].cpu() if deviations else None, shape)
            for (name, part), shape in zip(self.bank.per_layer(importance).items(), self.shapes, strict=True)
        }
        return Scores(layers, {"scorer": "soco", "steps": self.step, "train": self.task.train.model_dump(mode="json")})

    def _report(self, orders: Orders, kl: float, soft: float, ratio: float) -> None:
        speed = self.tokens_done / max(1e-9, time.monotonic() - self.started)
        values = {"phase": orders.phase, "kl": kl, "soft": soft, "hard": ratio, "tokens/s": speed}
        self.task.notify(Event("train", self.step, self.timetable.steps, values))

    def _save(self) -> None:
        if not parallel.leading():
            return
        tensors = pack(dict(self.bank.named_parameters()), self.optimiser)
        tensors |= {"support": self.bank.support, "died": self.died}
        if self.rules.peak is not None:
            tensors["peak"] = self.rules.peak
        header = {
            "kind": "training",
            "fingerprint": self.task.fingerprint,
            "step": self.step,
            "controllers": [vars(controller) for controller in self.controllers],
            "restricted": self.restricted,
            "timetable": vars(self.timetable),
            "rules": self.rules.state(),
        }
        self.task.workdir.mkdir(parents=True, exist_ok=True)
        write_tensors(self.task.workdir / CHECKPOINT, tensors, header)

    def _resume(self) -> None:
        path = self.task.workdir / CHECKPOINT
        if not path.exists():
            return
        tensors, header = read_tensors(path, "training")
        if header["fingerprint"] != self.task.fingerprint:
            return
        unpack(tensors, dict(self.bank.named_parameters()), self.optimiser)
        self.died, self.step = tensors["died"].to(self.device), header["step"]
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
