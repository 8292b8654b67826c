"""The graph computes what transformers computes: prefill, cached decode, padding, windows; every family and flavour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from tests.support import fresh
from tests.support.decoders import CONFIGS, Decoder, factor, save_dense, tiny_model, torch_logits

pytestmark = pytest.mark.transformers

MIXED = {"q_proj": ("stacked", 20), "v_proj": ("pivoted", 9), "up_proj": ("pivoted", 24), "down_proj": ("stacked", 17),
         "fc1": ("pivoted", 24), "fc2": ("stacked", 17)}  # fmt: skip
TOLERANCE = 2e-4


@pytest.fixture
def rng() -> np.random.Generator:
    return fresh.rng()


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


@pytest.mark.parametrize("kinds", ["ppp", "psd", "dps", "sdp"])
@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("name", ["llama-biased", "opt"])
def test_orders_are_folded_through_the_mlp_whatever_its_forms(name, pack, kinds, tmp_path: Path, rng) -> None:
    model = tiny_model(name)
    forms = {"p": ("pivoted", 24), "s": ("stacked", 17)}
    layers = [("gate_proj", "fc1"), ("up_proj",), ("down_proj", "fc2")]
    chosen = {
        suffix: forms[kind]
        for kind, suffixes in zip(kinds, layers, strict=True)
        for suffix in suffixes
        if kind in forms
    }
    summary = export_onnx(factor(model, tmp_path / "hf", chosen), tmp_path / "onnx", ExportSettings(pack=pack))
    tokens = rng.integers(3, 96, (1, 9))
    check(Decoder(tmp_path / "onnx"), model, tokens, np.ones_like(tokens), prefill=9)
    gathers = {"ppp": 2, "psd": 0, "dps": 0, "sdp": 1} if name != "opt" else {"ppp": 1, "psd": 0, "dps": 0, "sdp": 1}
    embeddings = 2 if name == "opt" else 1
    assert summary.graph.ops["Gather"] == embeddings + 2 * gathers[kinds]


@pytest.mark.parametrize("name", CONFIGS)
def test_standard_takes_left_padded_batches(name, tmp_path: Path, rng) -> None:
    model = tiny_model(name)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings())
    tokens = rng.integers(3, 96, (3, 24))
    mask = np.ones_like(tokens)
    mask[0, :5] = 0
    mask[1, :9] = 0
    check(Decoder(tmp_path / "onnx"), model, tokens, mask, prefill=12)


@pytest.mark.parametrize("name", ["llama3-rope", "mistral", "opt"])
def test_contrib_takes_right_padded_prompts(name, tmp_path: Path, rng) -> None:
    model = tiny_model(name)
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(flavour="contrib"))
    tokens = rng.integers(3, 96, (3, 14))
    mask = np.ones_like(tokens)
    mask[0, 9:] = 0
    mask[1, 11:] = 0
    check(Decoder(tmp_path / "onnx"), model, tokens, mask, prefill=14)


@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_prefill_in_two_pieces_longer_than_the_window(flavour, tmp_path: Path, rng) -> None:
    model = tiny_model("mistral")
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(flavour=flavour))
    tokens = rng.integers(3, 96, (1, 40))
    decoder = Decoder(tmp_path / "onnx")
    pieces = [(0, 13), (13, 31), (31, 40)] if flavour == "standard" else [(0, 31), (31, 40)]
    got = [decoder.step(tokens[:, start:end], np.ones((1, end), np.int64)) for start, end in pieces]
    expected = torch_logits(model, tokens, np.ones_like(tokens))
    assert np.abs(np.concatenate(got, axis=1) - expected).max() < TOLERANCE


@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_packing_and_last_token_change_nothing_else(flavour, tmp_path: Path, rng) -> None:
    model = tiny_model("qwen2")
    folder = factor(model, tmp_path / "hf", MIXED)
    for name, extra in {"plain": {}, "packed": {"pack": True}, "last": {"last_token_logits": True}}.items():
        export_onnx(folder, tmp_path / name, ExportSettings(flavour=flavour, **extra))
    tokens = rng.integers(3, 96, (1, 11))
    plain, packed, last = (
        Decoder(tmp_path / name).step(tokens, np.ones_like(tokens)) for name in ("plain", "packed", "last")
    )
    np.testing.assert_allclose(packed, plain, atol=2e-5)
    assert last.shape == (1, 1, 96)
    np.testing.assert_allclose(last, plain[:, -1:], atol=2e-5)


def test_half_precision_stays_close_and_logits_are_float32(tmp_path: Path, rng) -> None:
    model = tiny_model("qwen3")
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", ExportSettings(dtype="float16"))
    decoder = Decoder(tmp_path / "onnx")
    tokens = rng.integers(3, 96, (2, 20))
    mask = np.ones_like(tokens)
    got = np.concatenate([decoder.step(tokens[:, :12], mask[:, :12]), decoder.step(tokens[:, 12:], mask)], axis=1)
    assert got.dtype == np.float32
    assert decoder.inputs["past_key_values.0.key"].type == "tensor(float16)"
    assert np.abs(got - torch_logits(model, tokens, mask)).max() < 0.1
