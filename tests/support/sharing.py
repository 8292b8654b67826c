"""A small distillation that a test and the processes it starts can both run.

    python -m tests.support.sharing FOLDER '{"optimiser": "muon"}'

is one of several processes that divide it and leave it behind when its third step is done.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from soco_train import parallel
from soco_train.events import Event
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.refine.distill import distill
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from tests.support.models import make_model, random_layer

SETTINGS = {
    "steps": 6,
    "batch_tokens": 48,
    "lr": 1e-3,
    "held_out_blocks": 2,
    "evaluate_every": 2,
    "checkpoint_every": 2,
}


class Interrupted(Exception):
    """What ends a distillation on purpose."""


def small_distillation(
    workdir: Path, until: int | None = None, **changes: object
) -> tuple[dict[str, StackedFactors], list[int]]:
    """Distil random factors of a tiny Llama for 6 steps, a checkpoint every 2; return them and the steps reported.

    Raises Interrupted when step `until` is done. changes: of the settings.
    """
    torch.manual_seed(5)
    model = make_model("llama-tied")
    linears = select_linears(model, LayerSettings())
    layers = {name: random_layer("stacked", linear, 7, new_bias=False) for name, linear in linears.items()}
    factors = {name: layer for name, layer in layers.items() if isinstance(layer, StackedFactors)}
    steps: list[int] = []

    def tell(event: Event) -> None:
        steps.append(event.step)
        if event.step == until:
            raise Interrupted

    settings = DistillSettings.model_validate(SETTINGS | changes)
    tokens = torch.randint(model.config.vocab_size, (14, 16))
    subject = Subject(model, linears, {}, tokens)
    return distill(subject, factors, settings, Session(workdir, tell, fingerprint="task")), steps


if __name__ == "__main__":
    with parallel.group():
        small_distillation(Path(sys.argv[1]), until=3, shard=True, **json.loads(sys.argv[2]))
