"""A cache of integers in `contrib`: what transformers computes from keys and values rounded so, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from soco_export.evaluate.decoders import session
from soco_export.evaluate.decoders.session import OnnxDecoder, check_rounded_cache
from soco_export.export import export_onnx
from soco_export.onnx.cache import CacheScales, cache_scales
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.describe.order import head_order
from soco_export.onnx.families import describe
from soco_export.onnx.inspect import cache_bytes
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_export.preflight.checks import check_graph
from soco_export.recipe.load import load_recipe
from soco_train.errors import MachineError, RecipeError
from tests.support import decoders, fresh
from tests.support.decoders import Decoder, save_dense, tiny_model
from tests.support.zoo import ZOO

INT8, INT4 = (ExportSettings(flavour="contrib", cache=kind, layouts=("ort",)) for kind in ("int8", "int4"))
CASES = ["llama", "qwen3", "mistral", "gpt_oss", "phi"]  # norms of keys, a window, sinks, a rotation in part


class RoundedCache(DynamicCache):
    """Gives keys and values as integers of so many bits leave them; what it keeps is as it was."""

    def __init__(self, scales: list[CacheScales], orders: list[Any], bits: int) -> None:
        super().__init__()
        self.scales, self.orders, self.bits = scales, orders, bits

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *rest: Any, **more: Any) -> Any:
        keys, values = super().update(keys, values, layer_idx, *rest, **more)
        by, order = self.scales[layer_idx], self.orders[layer_idx]
        of_keys = torch.from_numpy(by.key)
        if order is not None:
            of_keys = of_keys[..., np.argsort(order)]
        return _rounded(keys, of_keys, self.bits), _rounded(values, torch.from_numpy(by.value), self.bits)


def _rounded(x: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    levels: torch.Tensor = (x / scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return levels * scale


@pytest.mark.parametrize(("settings", "bits"), [(INT8, 8), (INT4, 4)])
@pytest.mark.parametrize("name", CASES)
def test_prompt_and_steps_are_those_of_rounded_keys_and_values(
    name: str, settings: ExportSettings, bits: int, tmp_path: Path
) -> None:
    model = tiny_model(name, configs={**decoders.CONFIGS, **ZOO})
    folder = save_dense(model, tmp_path / "hf")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (8, 32)))
    tokens = fresh.rng().integers(3, 90, (1, 20))
    export_onnx(folder, tmp_path / "onnx", settings, calibration=lambda: text)
    architecture = describe(resolve_config(folder))
    assert architecture is not None
    scales = cache_scales(folder, architecture, text, settings.cache)
    orders = [head_order(layer.rope, architecture.attention.head_dim) for layer in architecture.each]
    with torch.no_grad():
        ids = torch.from_numpy(tokens)
        exact = model(ids).logits.numpy()
        expected = model(ids, past_key_values=RoundedCache(scales, orders, bits), use_cache=True).logits.numpy()
    decoder, mask = Decoder(tmp_path / "onnx"), np.ones_like(tokens)
    pieces = [(0, 13), *((at, at + 1) for at in range(13, tokens.shape[1]))]
    found = np.concatenate([decoder.step(tokens[:, start:stop], mask[:, :stop]) for start, stop in pieces], axis=1)
    # A value on the edge between two levels may fall to either side of it, and moves all that follows: of thousands
    # of values some do, and together they move less than a part of what the rounding of all does.
    assert np.linalg.norm(found - expected) < 0.25 * np.linalg.norm(exact - expected)
    assert 3e-3 * np.abs(exact).max() < np.abs(exact - expected).max()
    assert cache_bytes(tmp_path / "onnx") == architecture.cached * bits // 8


def test_the_text_of_rounded_weights_and_cache_is_read_once(tmp_path: Path) -> None:
    text = torch.from_numpy(fresh.rng().integers(3, 90, (8, 32)))
    asked: list[None] = []
    both = INT8.model_copy(update={"weights": "int4", "quantize": QuantizeSettings(rule="calibrated")})
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    export_onnx(folder, tmp_path / "onnx", both, calibration=lambda: (asked.append(None), text)[1])
    assert len(asked) == 1


@pytest.mark.parametrize("settings", [INT8, INT4])
def test_the_decoder_and_the_example_feed_it(settings: ExportSettings, tmp_path: Path) -> None:
    model = tiny_model("llama")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (8, 32)))
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", settings, calibration=lambda: text)
    decoder = OnnxDecoder(tmp_path / "onnx", threads=1)
    prompt = fresh.rng().integers(3, 90, (1, 9))
    prompted = decoder.prefill(prompt)
    run = decoder.repeatable(np.array([[5]]))
    run()
    assert prompted.shape == (1, 9, 96)
    assert decoder.step(np.array([[5]])).shape == (1, 1, 96)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["export.flavour=standard"], "only GroupQueryAttention"),
        (["export.flavour=contrib", "export.layouts=[optimum]"], "optimum caches floating-point numbers"),
        (["export.flavour=contrib", "export.layouts=[transformers.js]"], "transformers.js caches floating-point"),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_what_cannot_keep_integers_is_refused_before_training(kind: str, overrides: list[str], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_graph(load_recipe("tiny", [f"export.cache={kind}", *overrides]))


@pytest.mark.parametrize("wrong", [{"k_quant_type": "PER_STAR"}, {"kv_cache_bit_width": 3}])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_runtime_without_the_kernel_is_named_with_its_version(
    kind: str, wrong: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    check_rounded_cache("CPUExecutionProvider", kind)
    monkeypatch.setitem(session.ROUNDED_CACHE, kind, session.ROUNDED_CACHE[kind] | wrong)
    with pytest.raises(MachineError, match=f"has no attention with a cache of {kind}") as refused:
        check_rounded_cache("CPUExecutionProvider", kind)
    assert session.ort.__version__ in refused.value.message


def test_keys_in_int4_have_the_share_of_their_reach_that_leaves_least_error(tmp_path: Path) -> None:
    """By brute force in float64: the first token counts as much as all others; values keep their reach."""
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (8, 32)))
    architecture = describe(resolve_config(folder))
    assert architecture is not None
    found, reach = (cache_scales(folder, architecture, text, kind)[1] for kind in ("int4", "int8"))
    np.testing.assert_allclose(found.value, reach.value * 127 / 7, rtol=1e-5)
    with torch.no_grad():
        keys = tiny_model("llama")(text, use_cache=True).past_key_values.layers[1].keys.double()
    half, weights = architecture.attention.head_dim // 2, torch.ones(32)
    weights[0] = 31

    def error(scale: torch.Tensor) -> torch.Tensor:
        each = ((_rounded(keys, scale, 4) - keys).square() * weights[:, None]).sum((0, 2))
        return each[:, :half] + each[:, half:]

    tried = [error(torch.from_numpy(reach.key).double() * 127 / 7 * share) for share in np.arange(20, 4, -1) / 20]
    assert torch.allclose(error(torch.from_numpy(found.key).double()), torch.stack(tried).amin(0), rtol=1e-3)
    assert (found.key < reach.key * 127 / 7 * 0.99).mean() > 0.5  # clipping pays


def test_keys_and_values_behind_the_window_count(tmp_path: Path) -> None:
    """A window of 6: the largest value of the first layer, which reads no other token, is anywhere in the text."""
    model = tiny_model("mistral")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (4, 32)))
    folder = save_dense(model, tmp_path / "hf")
    architecture = describe(resolve_config(folder))
    assert architecture is not None
    found = cache_scales(folder, architecture, text, "int8")[0]
    with torch.no_grad():
        kept = DynamicCache()
        model(text, past_key_values=kept, use_cache=True)
    values = kept.layers[0].values
    assert values.shape[2] == 32
    assert torch.allclose(values.abs().amax((0, 2)), 127 * torch.from_numpy(found.value)[0, :, 0])


def test_no_text_no_scales(tmp_path: Path) -> None:
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    with pytest.raises(RecipeError) as refused:
        export_onnx(folder, tmp_path / "onnx", INT8)
    assert "export.cache is int8, and there is no calibration text" in refused.value.message


@pytest.mark.parametrize("settings", [INT8, INT4])
def test_genai_gives_the_tokens_of_the_graph(settings: ExportSettings, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    model = tiny_model("llama", eos_token_id=95)
    text = torch.from_numpy(fresh.rng().integers(3, 90, (8, 32)))
    settings = settings.model_copy(update={"layouts": ("genai",)})
    export_onnx(save_dense(model, tmp_path / "hf"), tmp_path / "onnx", settings, calibration=lambda: text)
    prompt = fresh.rng().integers(3, 90, (1, 9))
    expected = OnnxDecoder(tmp_path / "onnx", threads=1).generate(prompt, 12)[0].tolist()
    opened = genai.Model(str(tmp_path / "onnx"))
    wanted = genai.GeneratorParams(opened)
    wanted.set_search_options(max_length=21, do_sample=False)
    generator = genai.Generator(opened, wanted)
    generator.append_tokens(prompt[0].tolist())
    while not generator.is_done():
        generator.generate_next_token()
    found = [int(token) for token in generator.get_sequence(0)][9:]
    assert found
    assert found == expected[: len(found)]


@pytest.mark.parametrize("name", ["llama", "phi"])
def test_no_position_takes_a_key_out_of_reach_and_one_takes_it_there(name: str, tmp_path: Path) -> None:
    """Of every number of keys and values the largest over all positions of the context is the largest level."""
    model = tiny_model(name, configs={**decoders.CONFIGS, **ZOO})
    folder = save_dense(model, tmp_path / "hf")
    text = torch.from_numpy(fresh.rng().integers(3, 90, (4, 16)))
    architecture = describe(resolve_config(folder))
    assert architecture is not None
    first = cache_scales(folder, architecture, text, "int8")[0]
    order = head_order(architecture.each[0].rope, architecture.attention.head_dim)
    reach = 127 * torch.from_numpy(first.key if order is None else first.key[..., np.argsort(order)])
    largest = torch.zeros_like(reach)
    with torch.no_grad():
        for begun in range(architecture.context - 15):
            places = torch.arange(begun, begun + 16).expand(4, -1)
            keys = model(text, position_ids=places, use_cache=True).past_key_values.layers[0].keys
            assert bool((keys.abs() <= reach * (1 + 1e-5)).all())
            largest = torch.maximum(largest, keys.abs().amax((0, 2), keepdim=True))
        values = model(text, use_cache=True).past_key_values.layers[0].values
    assert torch.allclose(values.abs().amax((0, 2), keepdim=True), 127 * torch.from_numpy(first.value))
    assert bool((largest >= 0.85 * reach).all())  # between two positions a fast pair turns by up to a radian
    pair = first.key.reshape(-1, 2, first.key.shape[-1] // 2)
    assert np.abs(pair[:, 0] / pair[:, 1] - 1).max() > 0.05  # of a slow one each number has its own
