"""A mixture is read with its experts apart and is the model that transformers reads; files keep their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from soco_export import apply_factors, save_checkpoint
from soco_export.model.weights import map_weights, read_weights
from soco_train.modules.experts import open_mixtures
from tests.support import decoders
from tests.support.models import random_layer
from tests.support.zoo import ZOO

pytestmark = [
    pytest.mark.transformers,
    pytest.mark.skipif(version.parse(transformers.__version__).major < 5, reason="it reads them apart itself"),
]
# one by one under other names than the model's, under its own, with a shared expert, and a router by another name
APART = ("mixtral", "qwen3_moe", "glm4_moe", "phimoe")


def stored(name: str, folder: Path, **half: Any) -> Any:
    """Write a mixture with generation settings of its own, as its publisher does."""
    decoders.CONFIGS.setdefault(name, ZOO[name])
    model = decoders.tiny_model(name).to(**half)
    model.generation_config.eos_token_id = [1, 7]
    model.save_pretrained(folder)
    return model


def names_in(folder: Path) -> set[str]:
    with safe_open(str(folder / "model.safetensors"), framework="pt") as file:
        return set(file.keys())


@torch.no_grad()
@pytest.mark.parametrize("name", APART)
def test_what_is_read_apart_is_what_transformers_reads(name: str, tmp_path: Path) -> None:
    stored(name, tmp_path, dtype=torch.bfloat16)
    config, tokens = AutoConfig.from_pretrained(tmp_path), torch.randint(3, 90, (2, 18))
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = read_weights(tmp_path, config, trust_remote_code=False)
    assert type(model) is type(whole)
    assert any(open_mixtures(model))
    torch.testing.assert_close(model(tokens).logits, whole(tokens).logits, atol=2e-5, rtol=1e-4)
    assert model.generation_config.eos_token_id == [1, 7]
    again = map_weights(tmp_path, config, trust_remote_code=False)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(again.parameters(), model.parameters(), strict=True))


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "glm4_moe"])
def test_a_mixture_of_dense_experts_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    """Attention alone is pruned: the names of the experts are their publisher's again."""
    stored(name, tmp_path / "dense")
    model = read_weights(tmp_path / "dense", AutoConfig.from_pretrained(tmp_path / "dense"), trust_remote_code=False)
    place = "model.layers.1.self_attn.o_proj"
    apply_factors(model, {place: random_layer("stacked", model.get_submodule(place), 5, False)})
    expected = model(tokens := torch.randint(3, 90, (2, 18))).logits
    save_checkpoint(model, None, tmp_path / "hf")
    assert names_in(tmp_path / "hf") - {f"{place}.up.weight"} == names_in(tmp_path / "dense")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    torch.testing.assert_close(back(tokens).logits, expected, atol=2e-5, rtol=1e-4)
