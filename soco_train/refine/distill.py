"""Distillation of the factors, end to end: the largest single lever after the cut.

`up`, `down` and bias of every pruned layer are trained on KL to the dense model + ce_weight · cross entropy. The dense
model is the same model with its dense Linears switched back on, so there is no second copy. With
`held_out_blocks` the last calibration blocks are never trained on: the loss on them is measured every `evaluate_every`
steps, the best factors are the ones returned, and `patience` measurements without a better one end the training.
With `teacher_top` the dense model's predictions are remembered (teacher.py): it answers for every block before the
first step, and its pruned layers leave the GPU, which then holds the factors and what they need.
Several processes share each batch (parallel.py); each holds all factors, or its part of them with `shard`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from soco_train import parallel
from soco_train.data.batches import batch
from soco_train.errors import DataError
from soco_train.events import Event, Notify
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.divergence import divergence
from soco_train.learn.optimiser import optimisers, pack, unpack, warmup_cosine
from soco_train.learn.recompute import recomputing
from soco_train.learn.teacher import Teacher
from soco_train.modules.factored import FactorLinear, RoundedLinear, deployed
from soco_train.modules.layers import parked, teaching
from soco_train.settings import DistillSettings
from soco_train.store.tensorfile import read_tensors, write_tensors

CHECKPOINT = "distillation.safetensors"
_BEST = "best/"


@dataclass(frozen=True)
class DistillTask:
    """All that distillation needs. tokens: [n, t]; `workdir` receives checkpoints of the task named `fingerprint`.

    `remember_in`: a folder of this dense model, whose tasks share what it predicts; None: each keeps its own.
    """

    model: nn.Module
    linears: Mapping[str, nn.Linear]
    tokens: torch.Tensor
    settings: DistillSettings
    workdir: Path
    notify: Notify
    seed: int = 0
    fingerprint: str = ""
    remember_in: Path | None = None


def distill(task: DistillTask, factors: Mapping[str, StackedFactors]) -> dict[str, StackedFactors]:
    """Train the factors towards the dense model's predictions and return them; resumes from its checkpoint.

    Raises DataError if the loss is not finite, or if held-out blocks leave nothing to train on.
    """
    if len(task.tokens) <= task.settings.held_out_blocks:
        raise DataError(
            f"{task.settings.held_out_blocks} of {len(task.tokens)} calibration blocks are held out: none is left",
            fix="lower refine.distill.held_out_blocks or give more calibration text",
            where="recipe: refine.distill",
        )
    task.model.eval()
    folder = task.remember_in or task.workdir / f"teacher-{task.fingerprint[:16]}"
    with (
        deployed(task.model, task.linears, factors, task.settings.rounding) as everything,
        recomputing(task.model, task.settings.checkpoint_activations),
    ):
        layers = {name: layer for name, layer in everything.items() if isinstance(layer, FactorLinear)}
        parallel.agree(parameter for layer in layers.values() for parameter in layer.pair.parameters())
        if task.settings.shard:
            parallel.shard(layer.pair for layer in layers.values())
        teacher = Teacher(
            lambda tokens: _dense_logits(task.model, everything.values(), tokens), task.settings.teacher_top, folder
        )
        work = _Distillation(task, layers, teacher)
        if task.settings.teacher_top:
            work.ask_beforehand()
            with parked(layer.dense for layer in layers.values()):
                work.run()
        else:
            work.run()
        return {name: layer.factors() for name, layer in layers.items()}


def _dense_logits(
    model: nn.Module, layers: Iterable[FactorLinear | RoundedLinear], tokens: torch.Tensor
) -> torch.Tensor:
    with teaching(layers):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


class _Distillation:
    """The state of one distillation and its step."""

    def __init__(self, task: DistillTask, layers: Mapping[str, FactorLinear], teacher: Teacher) -> None:
        self.task, self.teacher, self.settings = task, teacher, task.settings
        held_out = task.settings.held_out_blocks
        self.tokens = task.tokens[: len(task.tokens) - held_out]
        self.held_out = task.tokens[len(task.tokens) - held_out :]
        self.parameters = {
            f"{name}:{part}": parameter
            for name, layer in layers.items()
            for part, parameter in layer.pair.named_parameters()
        }
        self.device = next(iter(self.parameters.values())).device
        self.optimisers = optimisers(self.settings.optimiser, self.parameters.values(), self.settings.lr)
        self.pairs = [layer.pair for layer in layers.values()]
        self.step = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_loss, self.misses = math.inf, 0
        self.started, self.tokens_done = 0.0, 0
        self._resume()

    def ask_beforehand(self) -> None:
        """Let the teacher remember what it says to all that is left to learn from."""
        steps = range(self.step, self.settings.steps)
        parts = [*self._held_out_parts(), *(parallel.share(self._batch(step))[0] for step in steps)]
        for number, part in enumerate(parts, 1):
            self.teacher.remember(part.to(self.device))
            self.task.notify(Event("teacher", number, len(parts)))

    def run(self) -> None:
        """Train until the last step, or until the held-out loss has stopped falling; end at the best factors."""
        self.started = time.monotonic()
        if self.step == 0:
            self._evaluate()
        while self.step < self.settings.steps and self.misses < self.settings.patience:
            self._one_step()
            if self.step % self.settings.evaluate_every == 0 or self._at_end():
                self._evaluate()
            if self.step % self.settings.checkpoint_every == 0 and not self._at_end():
                self._save()
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.parameters[name].copy_(tensor)
        parallel.divide_again(self.pairs)

    def _at_end(self) -> bool:
        return self.step == self.settings.steps

    def _one_step(self) -> None:
        sequences = self._batch(self.step)
        own, weight = parallel.share(sequences)
        loss, kl = self._loss(own.to(self.device))
        parallel.backward(loss, self.parameters.values(), weight)
        kl = parallel.combine(kl, weight)
        if not math.isfinite(float(kl)):
            raise DataError(
                f"the loss is {float(kl)} at distillation step {self.step}",
                fix="lower refine.distill.lr",
                where="refine",
            )
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.clip)
        lr = self.settings.lr * warmup_cosine(self.step, self.settings.steps, self.settings.warmup)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = lr
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_done += sequences.numel()
        self._report({"kl": float(kl)})

    def _batch(self, step: int) -> torch.Tensor:
        return batch(self.tokens, self.settings.batch_tokens, step, self.task.seed + 1)

    def _held_out_parts(self) -> Sequence[torch.Tensor]:
        if not len(self.held_out):
            return ()
        return self.held_out.split(max(1, self.settings.batch_tokens // self.held_out.shape[1]))

    def _loss(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        teacher = self.teacher(tokens)
        student = self.task.model(input_ids=tokens, use_cache=False).logits
        return divergence(student, teacher, tokens, self.settings.ce_weight)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure the loss on the held-out blocks, if any; remember the factors if it is the lowest yet."""
        parts = self._held_out_parts()
        if not parts:
            return
        losses = torch.tensor([float(self._loss(part.to(self.device))[0]) * len(part) for part in parts])
        parallel.agree([losses])  # so that all processes stop at the same step
        loss = float(losses.sum()) / len(self.held_out)
        if loss < self.best_loss:
            self.best_loss, self.misses = loss, 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            self.misses += 1
        self._report({"held-out loss": loss})

    def _report(self, values: Mapping[str, float]) -> None:
        speed = self.tokens_done / max(1e-9, time.monotonic() - self.started)
        self.task.notify(Event("distill", self.step, self.settings.steps, {**values, "tokens/s": speed}))

    def _save(self) -> None:
        header = {
            "kind": "distillation",
            "fingerprint": self.task.fingerprint,
            "step": self.step,
            "best_loss": self.best_loss if self.best else None,
            "misses": self.misses,
        }
        tensors = pack(self.parameters, *self.optimisers)
        tensors |= {_BEST + name: parallel.gathered(best) for name, best in self.best.items()}
        if not parallel.leading():
            return
        self.task.workdir.mkdir(parents=True, exist_ok=True)
        write_tensors(self.task.workdir / CHECKPOINT, tensors, header)

    def _resume(self) -> None:
        path = self.task.workdir / CHECKPOINT
        if not path.exists():
            return
        tensors, header = read_tensors(path, "distillation")
        own = torch.tensor(header["fingerprint"] == self.task.fingerprint)
        parallel.agree([own])  # factors measured on several GPUs may differ in their last bits, and so the fingerprints
        if not own:
            return
        unpack(tensors, self.parameters, *self.optimisers)
        self.step, self.misses = header["step"], header["misses"]
        if header["best_loss"] is not None:
            self.best_loss = header["best_loss"]
            self.best = {
                name: parallel.divided_like(tensors[_BEST + name], parameter)
                for name, parameter in self.parameters.items()
            }
