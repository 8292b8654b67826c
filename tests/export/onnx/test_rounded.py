"""A model rounded in PyTorch computes what the graph of its export does, whatever the type and block of each layer."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from soco_export.checkpoint.load import load_checkpoint
from soco_export.export import export_onnx
from soco_export.onnx.rounded import Rounder, round_as_exported
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from tests.support import fresh
from tests.support.decoders import Decoder, factor, tiny_model, torch_logits

FORMS = {"q_proj": ("stacked", 21), "k_proj": ("pivoted", 9)}
EACH = {"*.q_proj": "int8", "*.v_proj": "same", "*.down_proj": "int2", "*embed_tokens": "int8", "lm_head": "int8"}
BLOCKS = {"*.q_proj": 16, "*.o_proj": 64, "*.down_proj": 128}


@pytest.mark.parametrize("rule", ["nearest", "calibrated"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_rounded_model_computes_what_the_graph_does(name: str, rule: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = factor(model, tmp_path / "hf", FORMS)
    how = QuantizeSettings(rule=rule, blocks=BLOCKS, accuracy_level=1)
    settings = ExportSettings(weights="int4", each=EACH, quantize=how)
    text = torch.from_numpy(fresh.rng().integers(3, 96, (16, 32)))
    export_onnx(folder, tmp_path / "onnx", settings, calibration=lambda: text)
    tokens = fresh.rng().integers(3, 96, (2, 12))
    mask = np.ones_like(tokens)
    exact, rounded = torch_logits(model, tokens, mask), load_checkpoint(folder, dtype=torch.float32)
    rounder = Rounder(load_checkpoint(folder, dtype=torch.float32), text, tmp_path / "kept")
    round_as_exported(rounded, settings, rounder)
    expected = torch_logits(rounded, tokens, mask)
    again = load_checkpoint(folder, dtype=torch.float32)
    shutil.rmtree(tmp_path / "kept" / "inputs", ignore_errors=True)  # levels are kept, what they were found from is not
    round_as_exported(again, settings, Rounder(torch.nn.Module(), text, tmp_path / "kept"))
    assert np.array_equal(torch_logits(again, tokens, mask), expected)
    assert np.abs(Decoder(tmp_path / "onnx").step(tokens, mask) - expected).max() < 1e-3
    assert np.abs(exact - expected).max() > 1e-2


def test_levels_are_kept_by_rank_and_only_for_what_calibration_helps(tmp_path: Path) -> None:
    text = torch.from_numpy(fresh.rng().integers(3, 96, (16, 32)))
    how = QuantizeSettings(rule="calibrated")
    settings = ExportSettings(weights="int4", each={"*.k_proj": "int8", "lm_head": "int8"}, quantize=how)
    small, large = (
        load_checkpoint(factor(tiny_model("llama"), tmp_path / f"{rank}", {"q_proj": ("stacked", rank)}))
        for rank in (13, 21)
    )
    kept = Rounder(large, text, tmp_path / "kept", most_bits=4)
    assert not [name for name, _ in kept.levels(large, settings) if "k_proj" in name or "lm_head" in name]
    found = dict(kept.levels(small, settings))
    for name, expected in Rounder(large, text, tmp_path / "other", most_bits=4).levels(small, settings):
        if "q_proj" in name:
            assert torch.equal(found[name].values(), expected.values())
