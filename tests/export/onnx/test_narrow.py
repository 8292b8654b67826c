"""Values of fewer numbers than keys: the folder, the graph and transformers compute the same, or it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from safetensors.torch import load_file, save_file

from soco_export.checkpoint.layers import factored_layers
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint, save_dense
from soco_export.export import export_onnx
from soco_export.onnx.inspect import read_ports
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import DataError, RecipeError
from soco_train.numbers.blocks import Grid
from soco_train.settings.rounding import BITS
from tests.support import decoders, fresh
from tests.support.blocks import dequantize, quantize
from tests.support.decoders import Decoder, tiny_model, torch_logits
from tests.support.models import make_tokenizer
from tests.support.values import narrow
from tests.support.zoo import ZOO

pytestmark = pytest.mark.transformers

NUMBERS = 5  # of 16 or so: a graph takes any number
CASES = ["llama-biased", "smollm2", "mistral", "opt", "gemma2", "gpt_oss"]  # groups of 2, 1 and all; caps, sinks


def made(name: str, folder: Path, *each: int) -> Any:
    model = tiny_model(name, configs={**decoders.CONFIGS, **ZOO})
    narrow(model, *(each or (NUMBERS,)))
    save_checkpoint(model, None, folder)
    return model


def in_pieces(folder: Path, tokens: np.ndarray, mask: np.ndarray, prompt: int) -> np.ndarray:
    decoder = Decoder(folder)
    pieces = [(0, prompt), *((at, at + 1) for at in range(prompt, tokens.shape[1]))]
    return np.concatenate([decoder.step(tokens[:, start:stop], mask[:, :stop]) for start, stop in pieces], axis=1)


def known_here(name: str) -> Any:
    old = version.parse(transformers.__version__).major < 5 and "rope_parameters" in ZOO.get(name, ("", {}))[1]
    return pytest.param(name, marks=pytest.mark.skipif(old, reason="transformers 5 reads how its rope is written"))


@pytest.mark.parametrize("name", map(known_here, CASES))
def test_prompt_and_cached_steps_agree_under_padding(name: str, tmp_path: Path) -> None:
    model, pack = made(name, tmp_path / "hf"), name in CASES[::2]
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(pack=pack, layouts=("ort",)))
    tokens = fresh.rng().integers(3, 90, (2, 20))
    for padding in (0, 4):
        mask = np.ones_like(tokens)
        mask[0, :padding] = 0
        expected, real = torch_logits(model, tokens, mask), mask.astype(bool)
        found = in_pieces(tmp_path / "onnx", tokens, mask, 13)
        assert expected[real].std() > 0.1
        assert np.abs(found - expected)[real].max() < 1e-5 * np.abs(expected[real]).max()
    ports = read_ports(tmp_path / "onnx")
    for entry in (ports.inputs, ports.outputs):
        sizes = {name.rpartition(".")[2]: port.shape[3] for name, port in entry.items() if len(port.shape) == 4}
        assert sizes["value"] == NUMBERS < sizes["key"]


@pytest.mark.parametrize("each", [(8, 0), (3, 8)])
def test_every_layer_may_have_values_of_its_own_size(each: tuple[int, int], tmp_path: Path) -> None:
    model = made("llama-biased", tmp_path / "hf", *each)
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(layouts=("ort",)))
    tokens = fresh.rng().integers(3, 90, (1, 16))
    expected = torch_logits(model, tokens, np.ones_like(tokens))
    found = in_pieces(tmp_path / "onnx", tokens, np.ones_like(tokens), 9)
    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    ports = read_ports(tmp_path / "onnx").inputs
    keys, values = ([port.shape[3] for name, port in ports.items() if name.endswith(kind)] for kind in ("key", "value"))
    assert values == [stay or size for stay, size in zip(each, keys, strict=True)]


def test_transformers_loads_it_and_the_dense_form_computes_the_same(tmp_path: Path) -> None:
    model = made("llama-biased", tmp_path / "hf")
    tokens = np.random.default_rng().integers(3, 90, (2, 9))
    expected = torch_logits(model, tokens, np.ones_like(tokens))
    loaded = load_checkpoint(tmp_path / "hf")
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    save_dense(loaded, None, tmp_path / "dense")
    plain = load_checkpoint(tmp_path / "dense")
    assert not factored_layers(plain)
    for other in (loaded, plain):
        found = torch_logits(other, tokens, np.ones_like(tokens))
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_projections_are_the_small_matrices_rounded(weights: str, tmp_path: Path) -> None:
    model = made("mistral", tmp_path / "hf")
    how = {"accuracy_level": 1, "keep": ["*.mlp.*", "*.q_proj", "*.k_proj", "lm_head", "*embed*"]}
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(weights=weights, quantize=how, layouts=()))
    tokens = fresh.rng().integers(3, 90, (2, 12))
    mask = np.ones_like(tokens)
    exact = torch_logits(model, tokens, mask)
    for module in factored_layers(model).values():
        stored = quantize(module.weight.detach().numpy(), Grid(BITS[weights], 32, True))
        module.weight.data = torch.from_numpy(dequantize(stored, BITS[weights], module.weight.shape[1]))
    expected = torch_logits(model, tokens, mask)
    found = Decoder(tmp_path / "onnx").step(tokens, mask)
    assert np.abs(found - expected).max() < 1e-4 < np.abs(exact - expected).max()


def test_calibrated_rounding_knows_what_the_small_matrices_read(tmp_path: Path) -> None:
    model = made("llama-biased", tmp_path / "hf")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (16, 32)))
    settings = ExportSettings(weights="int4", quantize={"rule": "calibrated"}, layouts=())
    found = export_onnx(tmp_path / "hf", tmp_path / "onnx", settings, calibration=lambda: text).rounding
    assert found is not None
    layers = {name: found.layers[name] for name in factored_layers(model)}
    assert {layer.inputs for layer in layers.values()} == {64, 4 * NUMBERS}
    assert sum(layer.error for layer in layers.values()) < sum(layer.nearest for layer in layers.values())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flavour": "contrib"}, "GroupQueryAttention takes values as large as keys"),
        ({"layouts": ["genai"]}, "genai caches values as large as keys"),
        ({"layouts": ["ort", "optimum"]}, "optimum caches values as large as keys"),
        ({"layouts": ["transformers.js"]}, "transformers.js caches values as large as keys"),
    ],
)
def test_what_cannot_cache_so_is_refused_by_name(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    made("llama-biased", tmp_path / "hf")
    with pytest.raises(RecipeError, match=said):
        export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(**settings))
    assert not (tmp_path / "onnx").exists()


def test_projections_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    made("llama-biased", tmp_path / "hf")
    file = tmp_path / "hf" / "model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("v_proj.order"))
    save_file({**tensors, name: tensors[name].flip(0)}, file, {"format": "pt"})
    with pytest.raises(DataError, match="makes other values than"):
        export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(layouts=()))


def test_triton_is_told_the_size_of_each_part(tmp_path: Path) -> None:
    model = tiny_model("llama")
    narrow(model, NUMBERS)
    save_checkpoint(model, make_tokenizer(), tmp_path / "hf")
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings(layouts=("triton",)))
    text = (tmp_path / "onnx" / "triton" / "generate" / "config.pbtxt").read_text()
    said = json.loads(json.loads(text.partition("string_value: ")[2].partition(" } }")[0]))
    assert said["empty"]["past_key_values.1.value"] == [1, 2, 0, NUMBERS]
    assert said["empty"]["past_key_values.1.key"] == [1, 2, 0, 16]
