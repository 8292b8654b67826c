"""A folder that holds a decoder among other models: the decoder is taken, with its own names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from soco_export import export_onnx, load_checkpoint, save_checkpoint
from soco_export.files.wrapped import language_model
from soco_export.model.load import load_model, open_model
from soco_export.model.source import disagreement, read_architecture
from soco_export.model.which import recipe_for
from soco_export.onnx.check import check_architecture, check_tensors
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families import describe
from soco_export.onnx.read import open_weights
from soco_export.onnx.settings import ExportSettings
from soco_export.preflight.cost_shape import participation_notes
from soco_export.recipe.load import load_recipe
from soco_train.errors import DataError, RecipeError
from tests.export.model.test_models import SIZES, byte_tokenizer
from tests.support.decoders import Decoder

pytestmark = pytest.mark.transformers
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}


@pytest.fixture
def wrapped(tmp_path: Path) -> tuple[Path, Any]:
    text = {**SIZES, "model_type": "gemma3_text", "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8}
    vision = {**VISION, "patch_size": 14, "model_type": "siglip_vision_model"}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config=vision, mm_tokens_per_image=4)
    whole = AutoModelForImageTextToText.from_config(config).eval()
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    return tmp_path / "whole", whole


@torch.no_grad()
@pytest.mark.parametrize("prefix", ["language_model.model", "model.language_model"])
def test_the_decoder_of_a_wrapper_is_what_is_loaded(wrapped: tuple[Path, Any], prefix: str, tmp_path: Path) -> None:
    """Published files call it by the one name; files that transformers 5 writes may have the other."""
    folder, whole = wrapped
    file = folder / "model.safetensors"
    stored = {_inside(name, prefix): tensor for name, tensor in load_file(file).items()}
    save_file(stored, file, metadata={"format": "pt"})
    recipe = recipe_for(str(folder))
    tokens = torch.randint(3, 200, (2, 20))
    expected = whole(input_ids=tokens).logits
    for model in (load_model(recipe)[0], open_model(recipe)):
        assert model.config.model_type == "gemma3_text"
        torch.testing.assert_close(model(input_ids=tokens).logits, expected)
    save_checkpoint(model, None, tmp_path / "hf")
    architecture = describe(resolve_config(tmp_path / "hf"))
    assert architecture is not None
    check_tensors(architecture, open_weights(tmp_path / "hf", architecture))
    assert "reads text only" in participation_notes(recipe)[0]


PICTURES = {**VISION, "patch_size": 14, "model_type": "clip_vision_model"}
WRAPPERS = {
    "llava": {"text_config": {**SIZES, "model_type": "llama"}, "vision_config": PICTURES, "image_token_index": 5},
    "mistral3": {
        "text_config": {**SIZES, "model_type": "mistral", "head_dim": 8, "sliding_window": None},
        "vision_config": {**PICTURES, "model_type": "pixtral", "head_dim": 8},
        "image_token_index": 5,
    },
    "qwen3_vl": {
        "text_config": {
            **SIZES,
            **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
            "head_dim": 8,
            "rope_scaling": {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
        },
        "vision_config": {
            **{"depth": 1, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32},
            "deepstack_visual_indexes": [0],
        },
    },
    "qwen2_5_vl": {
        "text_config": {
            **SIZES,
            **dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]},
        },
        "vision_config": {
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
        },
    },
}


@torch.no_grad()
@pytest.mark.parametrize("kind", WRAPPERS)
def test_a_wrapper_is_exported_as_its_decoder(kind: str, tmp_path: Path) -> None:
    """Straight from its folder, and read back as what the export is held against."""
    torch.manual_seed(0)
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model(kind, **WRAPPERS[kind])).eval()
    whole.generation_config.bos_token_id = whole.generation_config.eos_token_id = 1
    for parameter in whole.parameters():
        parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5)
    whole.save_pretrained(tmp_path / "whole")
    byte_tokenizer().save_pretrained(tmp_path / "whole")
    tokens = torch.randint(6, 200, (2, 20))
    expected = whole(input_ids=tokens).logits
    torch.testing.assert_close(load_checkpoint(tmp_path / "whole")(input_ids=tokens).logits, expected)
    export_onnx(tmp_path / "whole", tmp_path / "onnx", ExportSettings())
    found = Decoder(tmp_path / "onnx").step(tokens.numpy(), np.ones((2, 20), np.int64))
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-4)
    assert "vision_config" not in json.loads((tmp_path / "onnx" / "config.json").read_text())


@torch.no_grad()
def test_a_wrapped_rotation_in_the_newer_spelling_alone_is_read(tmp_path: Path) -> None:
    """transformers 4.57 passes over it there too."""
    kind = {**WRAPPERS["llava"], "text_config": {**WRAPPERS["llava"]["text_config"], "rope_theta": 300.0}}
    whole = AutoModelForImageTextToText.from_config(AutoConfig.for_model("llava", **kind)).eval()
    whole.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    text = {key: value for key, value in config["text_config"].items() if "rope" not in key}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 300.0}
    (tmp_path / "config.json").write_text(json.dumps({**config, "text_config": text}))
    tokens = torch.randint(6, 200, (1, 30))
    torch.testing.assert_close(load_checkpoint(tmp_path)(input_ids=tokens).logits, whole(input_ids=tokens).logits)


def test_a_config_that_holds_its_decoder_flat_is_read_too() -> None:
    """As Qwen2-VL's was first published."""
    fields = {
        **SIZES,
        "model_type": "qwen2_vl",
        "vision_config": {},
        "rope_scaling": {"type": "mrope", "mrope_section": [1]},
    }
    inner = language_model(fields)
    assert inner is not None
    assert (inner["model_type"], inner["rope_scaling"]) == ("qwen2", {"type": "default"})


def test_a_wrapper_whose_decoder_is_not_known_alone_is_refused_at_once(wrapped: tuple[Path, Any]) -> None:
    """Tracing the whole of it would take minutes and read no images."""
    folder, _ = wrapped
    fields = {"model_type": "idefics3", "text_config": {**SIZES, "model_type": "unheard_of"}, "vision_config": {"a": 1}}
    config = replace(resolve_config(folder), values=fields)
    with pytest.raises(RecipeError, match="several models"):
        check_architecture(config, ExportSettings())


def _inside(name: str, prefix: str) -> str:
    for old in ("language_model.model.", "model.language_model."):
        if name.startswith(old):
            return f"{prefix}.{name.removeprefix(old)}"
    return name


def test_a_layer_that_config_json_forgets_is_still_found(wrapped: tuple[Path, Any]) -> None:
    folder, _ = wrapped
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 1
    config["text_config"].pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="not read by the model's class"):
        load_model(recipe_for(str(folder)))


def test_sizes_that_a_wrapper_leaves_to_its_class_agree_with_the_recipe(tmp_path: Path) -> None:
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
    assert not disagreement(load_recipe("gemma-3-4b").model.architecture, read_architecture(tmp_path))
