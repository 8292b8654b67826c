"""A description holds everything that the config says, or the config is refused by the name of the key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families.registry import describe
from soco_export.recipe.load import list_recipes, load_recipe
from soco_train.errors import DataError, RecipeError

pytestmark = pytest.mark.transformers

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
}
OPT: dict[str, Any] = {
    "model_type": "opt",
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "word_embed_proj_dim": 32,
}


def read(folder: Path, base: dict[str, Any], **changes: Any) -> Architecture | None:
    (folder / "config.json").write_text(json.dumps({**base, **changes}))
    return describe(resolve_config(folder))


def windows_of(found: Architecture | None) -> list[int | None]:
    assert found is not None
    return [layer.window for layer in found.each]


def test_llama_as_written(tmp_path: Path) -> None:
    found = read(tmp_path, LLAMA)
    assert found is not None
    shape = found.attention
    assert (shape.heads, shape.kv_heads, shape.head_dim, found.norm.epsilon) == (4, 2, 8, 1e-5)
    assert windows_of(found) == [None, None, None]
    assert found.mlp.gated
    assert found.linears()["model.layers.2.self_attn.k_proj"] == (16, 32)


def test_unknown_family_has_no_description(tmp_path: Path) -> None:
    assert read(tmp_path, {"model_type": "ctrl"}) is None


def test_notes_and_neutral_values_are_let_through(tmp_path: Path) -> None:
    harmless = {
        "_my_note": "x",
        "unsloth_version": "1",
        "rope_interleaved": False,
        "logit_scale": None,
        "max_length": 9,
    }
    assert read(tmp_path, LLAMA, **harmless) is not None
    assert read(tmp_path, LLAMA, attention_bias=True, mlp_bias=True) is not None


@pytest.mark.parametrize(
    ("base", "key", "value"),
    [
        (LLAMA, "logit_scale", 0.5),
        (LLAMA, "final_logit_softcapping", 30.0),
        (LLAMA, "residual_multiplier", 0.2),
        (LLAMA, "rope_scaling", {"rope_type": "proportional", "factor": 4.0}),
        (LLAMA, "hidden_act", "tanh"),
        ({**LLAMA, "model_type": "qwen2"}, "layer_types", ["full_attention", "chunked_attention", "full_attention"]),
        (OPT, "do_layer_norm_before", False),
        (OPT, "word_embed_proj_dim", 16),
        (OPT, "_remove_final_layer_norm", True),
        (OPT, "layer_norm_elementwise_affine", False),
    ],
)
def test_a_key_that_changes_the_mathematics_is_refused_by_name(base, key, value, tmp_path: Path) -> None:
    with pytest.raises((RecipeError, DataError)) as caught:
        read(tmp_path, base, **{key: value})
    assert key in str(caught.value) or "rope_parameters" in str(caught.value) or "layer_types" in str(caught.value)


def test_windows_follow_layer_types(tmp_path: Path) -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    windows = {"use_sliding_window": True, "sliding_window": 7, "layer_types": kinds}
    found = read(tmp_path, {**LLAMA, "model_type": "qwen2"}, **windows)
    assert windows_of(found) == [None, 7, None]
    unused = read(tmp_path, {**LLAMA, "model_type": "qwen2"}, use_sliding_window=False, sliding_window=7)
    assert windows_of(unused) == [None] * 3
    mistral = read(tmp_path, {**LLAMA, "model_type": "mistral"}, sliding_window=9)
    assert windows_of(mistral) == [9, 9, 9]


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


@pytest.mark.parametrize("scaling", [None, {"rope_type": "linear", "factor": 3.0}, LLAMA3])
@pytest.mark.parametrize("spelling", ["older", "newer", "both"])
def test_frequencies_are_those_of_transformers_in_either_spelling(scaling, spelling, tmp_path: Path) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    older = {"rope_theta": 7000.0, **({"rope_scaling": scaling} if scaling else {})}
    newer = {"rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": 7000.0}}
    written = {"older": older, "newer": newer, "both": {**older, **newer}}[spelling]
    found = read(tmp_path, LLAMA, **written)
    values = {key: value for key, value in LLAMA.items() if key != "model_type"}
    expected = LlamaRotaryEmbedding(LlamaConfig(**values, **older)).inv_freq
    assert found is not None
    rope = found.each[0].rope
    assert rope is not None
    np.testing.assert_array_equal(np.array(rope.frequencies, np.float32), expected.numpy())


def test_a_broken_config_is_the_files_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{ not json")
    with pytest.raises(DataError):
        resolve_config(tmp_path)
    with pytest.raises(DataError):
        resolve_config(tmp_path / "nowhere")


RECIPES = sorted(list_recipes())


@pytest.mark.parametrize("name", RECIPES)
def test_the_models_of_the_recipes_are_described(name, tmp_path: Path) -> None:
    published = load_recipe(name).model.architecture
    if not published:
        pytest.skip("the recipe names no architecture")
    found = read(tmp_path, published)
    assert found is not None
    assert found.layers == published["num_hidden_layers"]
    heads = published["num_attention_heads"]
    assert found.attention.sizes[0] == heads * published.get("head_dim", found.hidden // heads)
