"""The control that says what the text alone is worth: the dense layers trained on the same tokens, by cross entropy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from soco_train.data.batches import batch
from soco_train.events import Event, Notify
from soco_train.learn.optimiser import optimisers, warmup_cosine
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings


@contextmanager
def train_dense(
    model: Any, layers: LayerSettings, tokens: torch.Tensor, settings: DistillSettings, rate: float, notify: Notify
) -> Iterator[None]:
    """Within this context the participating layers are trained; then they are as they were.

    tokens: [n, block]. Batches, schedule and clipping are those of a distillation, the optimiser is Muon.
    """
    weights = [linear.weight for linear in select_linears(model, layers).values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        stepping = optimisers("muon", weights, rate)
        for step in range(settings.steps):
            for optimiser in stepping:
                for group in optimiser.param_groups:
                    group["lr"] = rate * warmup_cosine(step, settings.steps, settings.warmup)
            own = batch(tokens, settings.batch_tokens, step, seed=1).to(model.device)
            logits = model(input_ids=own, use_cache=False).logits[:, :-1]
            functional.cross_entropy(logits.flatten(0, 1).float(), own[:, 1:].flatten()).backward()
            torch.nn.utils.clip_grad_norm_(weights, settings.clip)
            for optimiser in stepping:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            notify(Event("dense", step + 1, settings.steps))
        for weight in weights:
            weight.requires_grad_(False)
        yield
    finally:
        with torch.no_grad():
            for weight, own in zip(weights, before, strict=True):
                weight.requires_grad_(False).copy_(own)
                weight.grad = None
