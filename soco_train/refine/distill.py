"""Distillation of the factors, end to end: the largest single lever after the cut.

`up`, `down` and bias of every pruned layer are trained on KL to the dense model + ce_weight · cross entropy; with
`rounding` the weights of layers that stay dense as well, each seen as the export will round it. The dense
model is the same model with its dense Linears switched back on, so there is no second copy. With
`held_out_blocks` the last calibration blocks are never trained on: the loss on them is measured every `evaluate_every`
steps, the best factors are the ones returned, and `patience` measurements without a better one end the training.
With `rate` the loss has a price on the bits that the rounded numbers would take in an entropy coder (numbers/rate.py).
With `teacher_top` the dense model's predictions are remembered (teacher.py): it answers for every block before the
first step, and its pruned layers leave the GPU, which then holds the factors and what they need.
Several processes share each batch (parallel.py); each holds all factors, or its part of them with `shard`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import nn

from soco_train import parallel
from soco_train.errors import DataError
from soco_train.events import Event
from soco_train.forms.base import LayerFactors
from soco_train.forms.heads import HeadColumns, HeadRows
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.divergence import divergence
from soco_train.learn.easy import EasyPairs
from soco_train.learn.loop import Loop
from soco_train.learn.optimiser import check_optimiser, optimisers, warmup_cosine
from soco_train.learn.recompute import recomputing
from soco_train.learn.teacher import Teacher, TopPredictions
from soco_train.modules.adapters import adapt
from soco_train.modules.factored import Deployed, FactorPair, Learning, TrainedLinear, deployed
from soco_train.modules.layers import parked, teaching
from soco_train.modules.subject import Session, Subject
from soco_train.numbers.rate import bits_per_weight
from soco_train.numbers.rounding import check_rounding, trains_dense
from soco_train.refine.distill_cost import distillation_cost
from soco_train.refine.rungs import rung
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import Storage

_BEST = "best/"


def check_distillation(settings: DistillSettings, storage: Storage) -> None:
    """Raise RecipeError for a rounding that the storage cannot have, or an optimiser that this PyTorch lacks."""
    check_rounding(settings.rounding, storage)
    check_optimiser(settings.optimiser)


@dataclass(frozen=True)
class Smaller:
    """The smaller model that each step trains beside the whole one: the first components of each layer.

    sizes: smallest and largest; ranks: size → how many components each layer has; seed: of the sizes drawn.
    """

    sizes: tuple[float, float]
    ranks: Callable[[float], Mapping[str, int]]
    seed: int

    def size(self, step: int) -> float:
        """Return the size of a step, evenly drawn, the same however often a training is resumed."""
        return round(random.Random(f"{self.seed} {step}").uniform(*self.sizes), 3)


def distill(
    subject: Subject,
    factors: Mapping[str, StackedFactors | HeadRows | HeadColumns],
    settings: DistillSettings,
    session: Session,
    smaller: Smaller | None = None,
) -> dict[str, LayerFactors]:
    """Train towards the dense model's predictions and return the factors, and the dense weights if they are trained.

    smaller: train a smaller model in the same factors too; the loss is the sum of both (any_size.py).
    Resumes from its checkpoint. Raises DataError if the loss is not finite, or if held-out blocks leave nothing to
    train on.
    """
    if len(subject.tokens) <= settings.held_out_blocks:
        raise DataError(
            f"{settings.held_out_blocks} of {len(subject.tokens)} calibration blocks are held out: none is left",
            fix="lower refine.distill.held_out_blocks or give more calibration text",
            where="recipe: refine.distill",
        )
    subject.model.eval()
    folder = session.remember_in or session.workdir / f"teacher-{session.fingerprint[:16]}"
    with (
        deployed(subject.model, subject.linears, factors, settings.rounding) as everything,
        recomputing(subject.model, settings.checkpoint_activations),
    ):
        layers = {name: layer for name, layer in everything.items() if isinstance(layer, TrainedLinear)}
        if settings.adapter.rank:
            adapt(layers, settings.adapter, session.seed)
        parallel.agree(parameter for layer in layers.values() for parameter in layer.learnt.parameters())
        if settings.shard:
            parallel.shard(layer.learnt for layer in layers.values())
        teacher = Teacher(
            lambda tokens: _dense_logits(subject.model, everything.values(), tokens), settings.teacher_top, folder
        )
        work = _Distillation(subject, settings, session, layers, teacher, smaller)
        if settings.teacher_top:
            work.ask_beforehand()
            with parked(layer.dense for layer in layers.values()):
                work.run()
        else:
            work.run()
        return {name: layer.learnt.numbers() for name, layer in layers.items()}


def _dense_logits(model: nn.Module, layers: Iterable[Deployed], tokens: torch.Tensor) -> torch.Tensor:
    with teaching(layers):
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


class _Distillation(Loop):
    """The state of one distillation and its step."""

    kind: ClassVar[str] = "distillation"
    stage: ClassVar[str] = "distill"
    rate: ClassVar[str] = "refine.distill.lr"

    def __init__(
        self,
        subject: Subject,
        settings: DistillSettings,
        session: Session,
        layers: Mapping[str, Learning],
        teacher: Teacher,
        smaller: Smaller | None = None,
    ) -> None:
        self.model, self.settings, self.teacher, self.smaller = subject.model, settings, teacher, smaller
        self.pairs = {name: layer.learnt for name, layer in layers.items() if isinstance(layer.learnt, FactorPair)}
        self.learnt = [layer.learnt for layer in layers.values()]
        parameters = {
            f"{name}:{part}": parameter
            for name, layer in layers.items()
            for part, parameter in layer.learnt.named_parameters()
            if parameter.requires_grad
        }
        stepping = optimisers(settings.optimiser, parameters.values(), settings.lr)
        learnt = len(subject.tokens) - settings.held_out_blocks
        # batches in another order than those that the scores were learnt on
        session = replace(session, seed=session.seed + 1)
        super().__init__(session, settings, subject.tokens[:learnt], parameters, stepping)
        self.held_out = subject.tokens[learnt:]
        self.easy = EasyPairs.of(subject.tokens[:learnt]) if settings.easy else None
        self.best: dict[str, torch.Tensor] = {}
        self.best_loss, self.misses = math.inf, 0
        self.resume()

    @property
    def steps(self) -> int:
        """Steps in all, unless the held-out loss stops falling before."""
        return self.settings.steps

    def goes_on(self) -> bool:
        """Tell whether there are steps left, and patience."""
        return super().goes_on() and self.misses < self.settings.patience

    def ask_beforehand(self) -> None:
        """Let the teacher remember what it says to all that is left to learn from."""
        steps = range(self.step, self.steps)
        parts = [*self._held_out_parts(), *(parallel.share(self.batch(step))[0] for step in steps)]
        for number, part in enumerate(parts, 1):
            self.teacher.remember(part.to(self.device))
            self.session.notify(Event("teacher", number, len(parts)))

    def run(self) -> None:
        """Train until the last step, or until the held-out loss has stopped falling; end at the best factors."""
        if self.step == 0:
            self._evaluate()
        super().run()
        with torch.no_grad():
            for name, tensor in self.best.items():
                self.parameters[name].copy_(tensor)
        parallel.divide_again(self.learnt)

    def one_step(self) -> None:
        """Take a step, and from time to time look at the held-out blocks."""
        tokens, weight = self.own_part()
        loss, kl = self._loss(tokens, self.smaller.size(self.step) if self.smaller else None)
        value = self.backward(loss, kl, weight)
        self.clip()
        self.update(warmup_cosine(self.step, self.steps, self.settings.warmup))
        self.step += 1
        self.report({"kl": value})
        if self.step % self.settings.evaluate_every == 0 or self.step == self.steps:
            self._evaluate()

    def _bits(self) -> torch.Tensor:
        """Return the bits of a rounded number, the mean over all that are trained."""
        parts = [(part, layer.rounding) for layer in self.learnt for part in layer.rounded_parts()]
        bits = [bits_per_weight(part, how) * part.numel() for part, how in parts if how]
        return torch.stack(bits).sum() / sum(part.numel() for part, _ in parts)

    def _held_out_parts(self) -> Sequence[torch.Tensor]:
        if not len(self.held_out):
            return ()
        return self.held_out.split(max(1, self.settings.batch_tokens // self.held_out.shape[1]))

    def _loss(self, tokens: torch.Tensor, size: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (loss, KL) of all components, bits priced in; with `size` that of the model of that size is added."""
        teacher = self.teacher(tokens)
        loss, kl = self._divergence(tokens, teacher)
        if self.settings.rate:
            loss = loss + self.settings.rate * self._bits()
        if self.smaller and size is not None:
            with self._only(self.smaller.ranks(size)):
                loss = loss + self._divergence(tokens, teacher)[0]
        return loss, kl

    def _divergence(
        self, tokens: torch.Tensor, teacher: torch.Tensor | TopPredictions
    ) -> tuple[torch.Tensor, torch.Tensor]:
        student = self.model(input_ids=tokens, use_cache=False).logits
        shares = self.easy.weights(tokens, self.settings.easy) if self.easy else None
        return divergence(student, teacher, tokens, self.settings.ce_weight, shares=shares)

    @contextmanager
    def _only(self, ranks: Mapping[str, int]) -> Iterator[None]:
        """Let only the first components of each layer take part."""
        for name, pair in self.pairs.items():
            pair.rank = ranks[name]
        try:
            yield
        finally:
            for pair in self.pairs.values():
                pair.rank = None

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Measure the loss on the held-out blocks, if any; remember the factors if it is the lowest yet."""
        parts = self._held_out_parts()
        if not parts:
            return
        size = self.smaller.sizes[0] if self.smaller else None
        losses = torch.tensor([float(self._loss(part.to(self.device), size)[0]) * len(part) for part in parts])
        parallel.agree([losses])  # so that all processes stop at the same step
        loss = float(losses.sum()) / len(self.held_out)
        if loss < self.best_loss:
            self.best_loss, self.misses = loss, 0
            self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        else:
            self.misses += 1
        self.report({"held-out loss": loss})

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Return the best factors so far, their loss, and how often nothing better was found since."""
        tensors = {_BEST + name: parallel.gathered(best) for name, best in self.best.items()}
        return tensors, {"best_loss": self.best_loss if self.best else None, "misses": self.misses}

    def restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        """Take back what `state` returned."""
        self.misses = header["misses"]
        if header["best_loss"] is not None:
            self.best_loss = header["best_loss"]
            self.best = {
                name: parallel.divided_like(tensors[_BEST + name], parameter)
                for name, parameter in self.parameters.items()
            }


@rung(
    "distill",
    on="factors",
    switch="steps",
    trains=True,
    check=check_distillation,
    cost=distillation_cost,
)
def _distill(
    subject: Subject,
    factors: Mapping[str, StackedFactors | HeadRows | HeadColumns],
    settings: DistillSettings,
    session: Session,
) -> Mapping[str, LayerFactors]:
    dense = any(trains_dense(settings.rounding, name) for name in subject.linears)
    return distill(subject, factors, settings, session) if factors or dense else factors
