"""A folder that holds a decoder among other models: the decoder is taken, with its own names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText

from soco_export import save_checkpoint
from soco_export.model.load import load_model, open_model
from soco_export.model.source import disagreement, read_architecture
from soco_export.model.which import recipe_for
from soco_export.onnx.check import check_tensors
from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families import describe
from soco_export.onnx.read import open_weights
from soco_export.preflight.cost_shape import participation_notes
from soco_export.recipe.load import load_recipe
from soco_train.errors import DataError
from tests.export.model.test_models import SIZES, byte_tokenizer

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
