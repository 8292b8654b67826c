"""The graph computes what transformers computes: prefill, cached decode, padding, windows; every family and flavour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_models import CONFIGS, Decoder, factor, save_dense, tiny_model, torch_logits

from soco_export.onnx.export import export_onnx
from soco_export.onnx.settings import ExportSettings

MIXED = {"q_proj": ("stacked", 20), "v_proj": ("pivoted", 9), "up_proj": ("pivoted", 24), "down_proj": ("stacked", 17),
         "fc1": ("pivoted", 24), "fc2": ("stacked", 17)}  # fmt: skip
TOLERANCE = 2e-4


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng()


def check(decoder: Decoder, model: object, tokens: np.ndarray, mask: np.ndarray, prefill: int) -> None:
    """Prefill, then one token at a time, against one pass of PyTorch over everything."""
    expected = torch_logits(model, tokens, mask)
    decoder.reset()
    got = [decoder.step(tokens[:, :prefill], mask[:, :prefill])]
    got += [decoder.step(tokens[:, t : t + 1], mask[:, : t + 1]) for t in range(prefill, tokens.shape[1])]
    real = mask.astype(bool)
    difference = np.abs(np.concatenate(got, axis=1) - expected)[real]
    assert expected[real].std() > 0.5
    assert difference.max() < TOLERANCE


@pytest.mark.parametrize("flavour", ["standard", "contrib"])
@pytest.mark.parametrize("name", CONFIGS)
def test_prefill_and_decode_agree_with_transformers(name, flavour, tmp_path: Path, rng) -> None:
    model = tiny_model(name)
    folder = factor(model, tmp_path / "hf", MIXED)
    export_onnx(folder, tmp_path / "onnx", ExportSettings(flavour=flavour))
    tokens = rng.integers(3, 96, (1, 26))
    check(Decoder(tmp_path / "onnx"), model, tokens, np.ones_like(tokens), prefill=10)


@pytest.mark.parametrize("name", CONFIGS)
def test_standard_takes_left_padded_batches(name, tmp_path: Path, rng) -> None:
    model = tiny_model(name)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings())
    tokens = rng.integers(3, 96, (3, 24))
    mask = np.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, :9] = 0
    check(Decoder(tmp_path / "onnx"), model, tokens, mask, prefill=12)
