"""After the cut: factors from the surviving components, and their distillation end to end.

    W' = P_K diag(s_K) B_K = up · down,   up = P_K diag(√s · β),   down = diag(√s / β) B_K

β splits each component's norm evenly between the two factors, so that both have a similar range (quantisation and half
precision want that). The deviation and the layer's bias become the bias of `up`.

Distillation trains up, down and bias of every pruned layer: KL to the dense model, which is the same model with its
dense Linears switched back on. Pivoted storage is another way to write the same rank-r matrices, so it is chosen last.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from soco_train.artifacts import Factors, LayerFactors, Scores, Spectrum, StackedFactors, read_tensors, write_tensors
from soco_train.batches import batch
from soco_train.budget import RankPlan, kept
from soco_train.errors import DataError
from soco_train.events import Event, Notify
from soco_train.layers import replace_module
from soco_train.objective import divergence
from soco_train.optimiser import pack, unpack, warmup_cosine
from soco_train.pivot import pivot_factors
from soco_train.settings import DistillSettings, Storage

CHECKPOINT = "distillation.safetensors"


def make_factors(
    spectra: Mapping[str, Spectrum], scores: Scores, plan: RankPlan, linears: Mapping[str, nn.Linear]
) -> dict[str, StackedFactors]:
    """Cut every pruned layer of `plan` and return its stacked factors; up: [m, r], down: [r, n], bias: [m] or None."""
    factors = {}
    for name, layer in plan.layers.items():
        if not layer.dense:
            bias = linears[name].bias
            factors[name] = _cut(spectra[name], scores, name, layer.rank, None if bias is None else bias.detach().cpu())
    return factors


def _cut(spectrum: Spectrum, scores: Scores, name: str, rank: int, bias: torch.Tensor | None) -> StackedFactors:
    layer = scores.layers[name]
    survivors = kept(layer.importance, rank)
    up, down = spectrum.P[:, survivors].double(), spectrum.B[survivors].double()
    root = layer.scale[survivors].double().clamp(min=0).sqrt()
    balance = (down.norm(dim=1) / up.norm(dim=0).clamp(min=1e-30)).sqrt().clamp(min=1e-15)
    up, down = up * (root * balance), down * (root / balance)[:, None]
    if layer.deviation is not None:
        bias = layer.deviation if bias is None else layer.deviation + bias
    return StackedFactors(up.float(), down.float(), None if bias is None else bias.float())


def store_as(factors: Mapping[str, StackedFactors], storage: Storage, provenance: Mapping[str, object]) -> Factors:
    """Write stacked factors in the form the plan counted on; lossless."""
    layers: dict[str, LayerFactors] = dict(factors)
    if storage == "pivoted":
        layers = {name: pivot_factors(layer) for name, layer in factors.items()}
    return Factors(layers, provenance)


class FactorLinear(nn.Module):
    """A pruned layer in training: y = up (down x) + bias, or the dense layer in teacher mode."""

    def __init__(self, dense: nn.Linear, factors: StackedFactors) -> None:
        super().__init__()
        self.dense = dense.requires_grad_(False)
        self.teaching = False
        device = dense.weight.device
        self.up = nn.Parameter(factors.up.clone().to(device))
        self.down = nn.Parameter(factors.down.clone().to(device))
        self.bias = None if factors.bias is None else nn.Parameter(factors.bias.clone().to(device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Input [..., n], output [..., m], in the dtype of x."""
        if self.teaching:
            return self.dense(x)
        z = functional.linear(x, self.down.to(x.dtype))
        return functional.linear(z, self.up.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))

    def factors(self) -> StackedFactors:
        """Return the factors as they are now."""
        bias = None if self.bias is None else self.bias.detach().cpu().clone()
        return StackedFactors(self.up.detach().cpu().clone(), self.down.detach().cpu().clone(), bias)


@contextmanager
def _factored(
    model: nn.Module, linears: Mapping[str, nn.Linear], factors: Mapping[str, StackedFactors]
) -> Iterator[dict[str, FactorLinear]]:
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    layers = {name: FactorLinear(linears[name], factors[name]) for name in factors}
    for name, layer in layers.items():
        replace_module(model, name, layer)
    try:
        yield layers
    finally:
        for name in layers:
            replace_module(model, name, linears[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


@contextmanager
def _teaching(layers: Mapping[str, FactorLinear]) -> Iterator[None]:
    for layer in layers.values():
        layer.teaching = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in layers.values():
            layer.teaching = False


@dataclass(frozen=True)
class DistillTask:
    """All that distillation needs. tokens: [n, t]; `workdir` receives checkpoints of the task named `fingerprint`."""

    model: nn.Module
    linears: Mapping[str, nn.Linear]
    tokens: torch.Tensor
    settings: DistillSettings
    workdir: Path
    notify: Notify
    seed: int = 0
    fingerprint: str = ""


def distill(task: DistillTask, factors: Mapping[str, StackedFactors]) -> dict[str, StackedFactors]:
    """Train the factors towards the dense model's predictions and return them; resumes from its checkpoint.

    Raises DataError if the loss is not finite.
    """
    if not factors or task.settings.steps == 0:
        return dict(factors)
    task.model.eval()
    with _factored(task.model, task.linears, factors) as layers:
        _Distillation(task, layers).run()
        return {name: layer.factors() for name, layer in layers.items()}


class _Distillation:
    def __init__(self, task: DistillTask, layers: Mapping[str, FactorLinear]) -> None:
        self.task, self.layers = task, layers
        self.parameters = {
            f"{name}:{part}": parameter
            for name, layer in layers.items()
            for part, parameter in layer.named_parameters()
            if parameter.requires_grad
        }
        self.optimiser = torch.optim.AdamW(
            self.parameters.values(), lr=task.settings.lr, betas=(0.9, 0.95), weight_decay=0
        )
        self.step = 0
        self.started, self.tokens_done = time.monotonic(), 0
        self._resume()

    def run(self) -> None:
        settings = self.task.settings
        while self.step < settings.steps:
            self._one_step()
            if self.step % settings.checkpoint_every == 0 and self.step < settings.steps:
                self._save()

    def _one_step(self) -> None:
        settings = self.task.settings
        tokens = batch(self.task.tokens, settings.batch_tokens, self.step, self.task.seed + 1)
        tokens = tokens.to(next(iter(self.parameters.values())).device)
        with _teaching(self.layers):
            teacher = self.task.model(input_ids=tokens, use_cache=False).logits
        student = self.task.model(input_ids=tokens, use_cache=False).logits
        loss, kl = divergence(student, teacher, tokens, settings.ce_weight)
        loss.backward()
        if not math.isfinite(float(kl)):
            raise DataError(
                f"the loss is {float(kl)} at distillation step {self.step}",
                fix="lower refine.distill.lr",
                where="refine",
            )
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        for group in self.optimiser.param_groups:
            group["lr"] = settings.lr * warmup_cosine(self.step, settings.steps, settings.warmup)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_done += tokens.numel()
        speed = self.tokens_done / max(1e-9, time.monotonic() - self.started)
        self.task.notify(Event("distill", self.step, settings.steps, {"kl": float(kl), "tokens/s": speed}))

    def _save(self) -> None:
        header = {"kind": "distillation", "fingerprint": self.task.fingerprint, "step": self.step}
        self.task.workdir.mkdir(parents=True, exist_ok=True)
        write_tensors(self.task.workdir / CHECKPOINT, pack(self.parameters, self.optimiser), header)

    def _resume(self) -> None:
        path = self.task.workdir / CHECKPOINT
        if not path.exists():
            return
        tensors, header = read_tensors(path, "distillation")
        if header["fingerprint"] == self.task.fingerprint:
            unpack(tensors, self.parameters, self.optimiser)
            self.step = header["step"]
