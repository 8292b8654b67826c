"""What is learnt on a GPU is what the CPU learns, by the calls of the library.

The same test has the CPU in both places; without a GPU the other half is skipped. Which operator of an export ran where
is proven in every run (docs/onnx.md).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from soco_train import cut_factors, learn_scores, plan_ranks
from soco_train.settings import DistillSettings, PlanSettings, RefineSettings, Storage, TrainSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from tests.e2e.tiny_models import make_model

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
TRAIN = TrainSettings(
    basis="two-sided", start="spectrum", steps=12, batch_tokens=64, lr=0.02, checkpoint_activations=True
)
DISTILL = DistillSettings(steps=6, batch_tokens=64, lr=1e-3, teacher_top=32, held_out_blocks=2, evaluate_every=3)


def learn(device: str, storage: Storage, folder: Path) -> tuple[Any, Scores, Factors]:
    torch.manual_seed(3)
    model = make_model("llama-tied").to(device)
    tokens = torch.randint(model.config.vocab_size, (14, 16))
    plan = PlanSettings(keep_params=0.6, storage=storage)
    scores = learn_scores(model, tokens, folder, TRAIN, plan)
    ranks = plan_ranks(scores, plan)
    return model, scores, cut_factors(model, tokens, scores, ranks, folder, RefineSettings(distill=DISTILL))


@pytest.mark.parametrize("storage", ["stacked", "pivoted"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_device_learns_what_the_cpu_learns(device: str, storage: Storage, tmp_path: Path) -> None:
    _, expected, _ = learn("cpu", storage, tmp_path / "cpu")
    model, found, factors = learn(device, storage, tmp_path / "device")
    assert {parameter.device.type for parameter in model.parameters()} == {device}, "what was parked is back"
    for name, layer in expected.layers.items():
        assert float((found.layers[name].scale - layer.scale).abs().mean()) < 1e-3
    for layer in factors.layers.values():
        assert all(tensor.device.type == "cpu" for tensor in vars(layer).values() if tensor is not None)
