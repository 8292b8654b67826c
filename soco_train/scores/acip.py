"""ACIP's rule as a scorer: binary masks over singular components under a growing l1 pressure, with LoRA beside them.

    y = P (1[p > 0] ⊙ (B x + α C A x)) + bias        L = CE + λ_t Σ relu(p)

Published (arXiv 2502.01717 and its code): the mask is binary in the forward pass and passes gradients straight through
to p, p starts at 1/√k and stays dead once it is 0; λ_t grows geometrically; masks and adapters learn together, on cross
entropy; when the size is reached the masks stop and the adapters go on alone; who died later ranks higher, survivors
rank by p; the basis is the plain SVD.

Ours, so that it fits the same few tokens as every other method here: λ is measured in the typical gradient of the first
step and grows by the step count and not by 1 % in 4 steps; the masks stop after 70 % of the steps at the latest; the
learning rates; no dropout. And LoRA works on the inner factor instead of beside the layer: B + α C A has the rank that
the support leaves it, so the adapter costs no parameter at any size, where the published one stays beside the layer.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from soco_train import parallel
from soco_train.data.batches import batch
from soco_train.errors import DataError
from soco_train.events import Event
from soco_train.learn.divergence import divergence
from soco_train.learn.optimiser import pack, unpack
from soco_train.learn.recompute import recomputing
from soco_train.modules.layers import substituted
from soco_train.modules.masked import ADAPTER_SCALE, MaskedLinear
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.scores.registry import scorer
from soco_train.scores.size import SoftSize
from soco_train.scores.task import DTYPES, ScoringTask, TrainingTask, sized, training
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.tensorfile import read_tensors, write_tensors

CHECKPOINT = "masks.safetensors"
PRESSURE = (0.1, 100.0)  # λ in typical gradients: at the first step, and when the masks must stop
MASKS_STOP = 0.7  # of all steps


def masked_model(task: TrainingTask) -> AbstractContextManager[dict[str, MaskedLinear]]:
    """Put MaskedLinears in the place of the task's Linears for the duration of the context, all else frozen."""
    seeds = {name: task.train.seed * 1_000_003 + number for number, name in enumerate(task.linears)}
    dtype = DTYPES[task.train.factor_dtype]
    return substituted(
        task.model, task.linears, lambda name, linear: MaskedLinear(linear, task.spectra[name], dtype, seeds[name])
    )


def train_masks(task: TrainingTask) -> Scores:
    """Learn masks and adapters; goes on from its checkpoint. Raises DataError if the loss is not finite."""
    task.model.eval()
    with masked_model(task) as layers, recomputing(task.model, task.train.checkpoint_activations):
        return _Run(task, layers).finish()


class _Run:
    """The state of one training and its step."""

    def __init__(self, task: TrainingTask, layers: Mapping[str, MaskedLinear]) -> None:
        self.task, self.layers = task, layers
        self.shapes = [(layer.dense.out_features, layer.dense.in_features) for layer in layers.values()]
        self.masks: list[torch.Tensor] = [layer.p for layer in layers.values()]
        self.device = self.masks[0].device
        ranks = [p.numel() for p in self.masks]
        self.size = SoftSize(self.shapes, ranks, task.plan, False, self.device)
        self.parameters = {f"{name}:{part}": p for name, x in layers.items() for part, p in _trained(x).items()}
        adapters = [p for name, p in self.parameters.items() if not name.endswith(":p")]
        groups: list[dict[str, Any]] = [
            {"params": self.masks, "lr": task.train.lr},
            {"params": adapters, "lr": task.train.lr_deviation},
        ]
        self.optimiser = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
        self.died = torch.full((sum(ranks),), math.inf, device=self.device)
        self.step, self.frozen, self.unit = 0, False, math.nan
        self.started, self.tokens_done = time.monotonic(), 0
        self._resume()
        parallel.agree(self.parameters.values())

    def finish(self) -> Scores:
        """Run the remaining steps and return the scores."""
        while self.step < self.task.train.steps:
            self._one_step()
            if self.step % self.task.train.checkpoint_every == 0:
                self._save()
        self._save()
        return self.scores()

    def _one_step(self) -> None:
        train, keep = self.task.train, self.task.plan.keep_params
        ratio = float(self.size.whole(self.size((torch.cat(self.masks) > 0).float())))
        if not self.frozen and (ratio <= keep or self.step >= MASKS_STOP * train.steps):
            self._freeze()
        loss = self._backward()
        torch.nn.utils.clip_grad_norm_(self.parameters.values(), train.clip)
        self._press()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.step += 1
        dead = (torch.cat(self.masks) <= 0) & self.died.isinf()
        self.died = torch.where(dead, float(self.step), self.died)
        speed = self.tokens_done / max(1e-9, time.monotonic() - self.started)
        values = {"loss": loss, "hard": ratio, "tokens/s": speed}
        self.task.notify(Event("train", self.step, train.steps, values))

    def _backward(self) -> float:
        """Leave the gradients of the cross entropy of the whole batch; return it."""
        sequences = batch(self.task.tokens, self.task.train.batch_tokens, self.step, self.task.train.seed)
        self.tokens_done += sequences.numel()
        own, weight = parallel.share(sequences)
        tokens = own.to(self.device)
        logits = self.task.model(input_ids=tokens, use_cache=False).logits
        # against itself the divergence is nothing: what is left is the cross entropy
        loss, _ = divergence(logits, logits.detach(), tokens, ce_weight=1.0, chunk=self.task.train.logit_chunk)
        loss.backward()
        parallel.combine_gradients(self.parameters.values(), weight)
        value = float(parallel.combine(loss.detach(), weight))
        if not math.isfinite(value):
            raise DataError(
                f"the loss is {value} at step {self.step}", fix="lower train.lr", where=str(self.task.workdir)
            )
        return value

    def _press(self) -> None:
        """Add λ_t, the gradient of the l1 term, to every mask that is alive."""
        if self.frozen:
            for p in self.masks:
                p.grad = None
            return
        if math.isnan(self.unit):
            self.unit = float(torch.cat([_gradient(p) for p in self.masks]).abs().median())
        first, last = PRESSURE
        progress = self.step / max(1.0, MASKS_STOP * self.task.train.steps)
        pressure = self.unit * first * (last / first) ** progress
        for p in self.masks:
            p.grad = _gradient(p) + pressure * (p > 0)

    def _freeze(self) -> None:
        """Fix the masks at the support that the plan will cut; layers it leaves dense answer as such from now on."""
        scores, self.frozen = self.scores(), True
        for name, planned in plan_ranks(scores, self.task.plan).layers.items():
            layer = self.layers[name]
            layer.left_dense = planned.dense
            support = torch.zeros_like(layer.p, dtype=torch.bool)
            support[kept(scores.layers[name].importance, planned.rank).to(self.device)] = True
            layer.p.data.copy_(torch.where(support, layer.p.clamp(min=1e-6), layer.p.clamp(max=0)))
            layer.p.requires_grad_(False)

    def scores(self) -> Scores:
        """Read the scores off: survivors by p, above all the dead, who rank the higher the later they died."""
        found = {}
        died = self.died.clamp(max=float(self.task.train.steps)) / max(1, self.task.train.steps)
        parts = died.split([p.numel() for p in self.masks])
        for (name, layer), order, shape in zip(self.layers.items(), parts, self.shapes, strict=True):
            p = layer.p.detach()
            correction = ((ADAPTER_SCALE * layer.C.detach()).cpu(), layer.A.detach().cpu())
            importance = torch.where(p > 0, p + 1.0, order.to(p)).cpu()
            found[name] = LayerScores(importance, torch.ones_like(importance), None, shape, correction)
        return Scores(found, {"scorer": "acip", "steps": self.step, "train": self.task.train.model_dump(mode="json")})

    def _save(self) -> None:
        if not parallel.leading():
            return
        header = {
            "kind": "masks",
            "fingerprint": self.task.fingerprint,
            "step": self.step,
            "frozen": self.frozen,
            "unit": self.unit,
            "left_dense": [name for name, layer in self.layers.items() if layer.left_dense],
        }
        self.task.workdir.mkdir(parents=True, exist_ok=True)
        tensors = pack(self.parameters, self.optimiser) | {"died": self.died}
        write_tensors(self.task.workdir / CHECKPOINT, tensors, header)

    def _resume(self) -> None:
        path = self.task.workdir / CHECKPOINT
        if not path.exists():
            return
        tensors, header = read_tensors(path, "masks")
        if header["fingerprint"] != self.task.fingerprint:
            return
        unpack(tensors, self.parameters, self.optimiser)
        self.died = tensors["died"].to(self.device)
        self.step, self.frozen, self.unit = header["step"], header["frozen"], header["unit"]
        for name, layer in self.layers.items():
            layer.left_dense = name in header["left_dense"]
            layer.p.requires_grad_(not self.frozen)


def _trained(layer: MaskedLinear) -> dict[str, nn.Parameter]:
    return {"p": layer.p, "C": layer.C, "A": layer.A}


def _gradient(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


@scorer("acip")
def acip(task: ScoringTask) -> Scores:
    """Learn masks and adapters as ACIP does: the control whose components die under l1 pressure."""
    return train_masks(training(sized(task), None))
