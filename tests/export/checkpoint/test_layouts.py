"""Conv1D (GPT-2) and FalconLinear through the whole method: learnt, cut, stored, loaded again, merged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import soco_train
from soco_export.checkpoint.layers import apply_factors, factored_layers
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.stream import stream_checkpoint
from soco_export.checkpoint.writer import save_checkpoint, save_dense
from soco_train.forms.dense import DenseWeight
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings
from tests.support import decoders
from tests.support.models import logits
from tests.support.zoo import ZOO

pytestmark = pytest.mark.transformers
TRAIN = TrainSettings(steps=4, batch_tokens=64, statistics_blocks=4)
REFINE = RefineSettings.model_validate({"distill": {"steps": 2, "batch_tokens": 64}})


@pytest.fixture(params=["gpt2", "falcon-7b"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(decoders.CONFIGS, request.param, ZOO[request.param])
    return str(request.param)


def learn(model: Any, work: Path) -> Any:
    tokens = torch.randint(3, 90, (8, 32))
    plan = PlanSettings(keep_params=0.5)
    scores = soco_train.learn_scores(model, tokens, work, TRAIN, plan)
    return soco_train.cut_factors(model, tokens, scores, plan_ranks(scores, plan), work, REFINE)


def test_a_layout_goes_the_whole_way_to_files_and_back(name: str, tmp_path: Path) -> None:
    model, ids = decoders.tiny_model(name), torch.randint(3, 90, (2, 12))
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = logits(model, ids)
    factors = learn(model, tmp_path / "work")
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    torch.testing.assert_close(logits(model, ids), before, rtol=0, atol=0)
    assert len(factors.layers) >= 4
    apply_factors(model, factors)
    low = logits(model, ids)
    assert not torch.allclose(low, before, atol=1e-2)
    save_checkpoint(model, None, tmp_path / "hf")
    loaded = load_checkpoint(tmp_path / "hf")
    torch.testing.assert_close(logits(loaded, ids), low)
    save_dense(loaded, None, tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert not factored_layers(dense)
    torch.testing.assert_close(logits(dense, ids), low, rtol=1e-4, atol=1e-4)


def test_a_streamed_folder_holds_dense_layers_as_the_model_stores_them(name: str, tmp_path: Path) -> None:
    """Square layers too: there a weight that is the wrong way round has the right shape."""
    model, ids = decoders.tiny_model(name), torch.randint(3, 90, (2, 12))
    model.save_pretrained(tmp_path / "source")
    stored = load_checkpoint(tmp_path / "source")
    output = "transformer.h.0.attn.c_proj" if name == "gpt2" else "transformer.h.0.self_attention.dense"
    layers = {output: DenseWeight(torch.randn(64, 64) / 8, torch.randn(64))}
    apply_factors(model, layers)
    expected = logits(model, ids)
    apply_factors(stored, layers, torch.float32, "meta")
    stream_checkpoint(stored, layers, torch.float32, None, tmp_path / "hf")
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "hf"), ids), expected)
