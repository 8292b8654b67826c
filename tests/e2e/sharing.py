"""A small distillation that a test and the processes it starts can both run."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from soco_train.artifacts import StackedFactors
from soco_train.distill import DistillTask, distill
from soco_train.events import Event
from soco_train.layers import select_linears
from soco_train.settings import DistillSettings, LayerSettings


class Interrupted(Exception):
    """What ends a distillation on purpose."""


def small_distillation(
    workdir: Path, until: int | None = None, shard: bool = False
) -> tuple[dict[str, StackedFactors], list[int]]:
    """Distil random factors of a random Llama for 6 steps, a checkpoint every 2; return them and the steps reported.

    Raises Interrupted when step `until` is done.
    """
    torch.manual_seed(5)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
        )
    )
    linears = select_linears(model, LayerSettings())
    factors = {
        name: StackedFactors(0.2 * torch.randn(linear.out_features, 7), 0.2 * torch.randn(7, linear.in_features), None)
        for name, linear in linears.items()
    }
    steps: list[int] = []

    def tell(event: Event) -> None:
        steps.append(event.step)
        if event.step == until:
            raise Interrupted

    settings = DistillSettings(
        steps=6, batch_tokens=48, lr=1e-3, held_out_blocks=2, evaluate_every=2, checkpoint_every=2, shard=shard
    )
    tokens = torch.randint(64, (14, 16))
    return distill(DistillTask(model, linears, tokens, settings, workdir, tell, fingerprint="task"), factors), steps
