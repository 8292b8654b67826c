"""A further family, described here in one function, goes the whole road: trained, written, exported, proven."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, decoder
from soco_export.onnx.families.registry import FAMILIES, family
from tests.support.cli import FEW_STEPS, soco
from tests.support.models import VOCABULARY, make_tokenizer


class ShyConfig(LlamaConfig):
    model_type = "shy"
    shyness: float = 1.0
    shy_layers: int = 0


class ShyForCausalLM(LlamaForCausalLM):
    """Llama whose logits are divided by the config's `shyness`."""

    config_class = ShyConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = found.logits / self.config.shyness
        return found


@pytest.fixture
def shy(tmp_path: Path) -> Iterator[Path]:
    """Return a folder of a small shy model that transformers knows."""
    AutoConfig.register("shy", ShyConfig)
    AutoModelForCausalLM.register(ShyConfig, ShyForCausalLM)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = ShyConfig(vocab_size=VOCABULARY, max_position_embeddings=128, num_key_value_heads=2, shyness=4.0, **sizes)
    ShyForCausalLM(config).save_pretrained(tmp_path / "shy")
    make_tokenizer().save_pretrained(tmp_path / "shy")
    yield tmp_path / "shy"
    FAMILIES.pop("shy", None)
    CONFIG_MAPPING._extra_content.pop("shy")
    MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(ShyConfig)


def describe_shy() -> None:
    @family("shy", keys=f"{COMMON} shyness")
    def described(config: Config) -> Architecture:
        base = decoder(config)
        return replace(base, scales=replace(base.scales, logits=1 / config["shyness"]))


@pytest.mark.transformers
@pytest.mark.parametrize("flavour", ["standard", "contrib"])
def test_the_whole_road(flavour: str, shy: Path, tmp_path: Path) -> None:
    describe_shy()
    run = tmp_path / "run"
    done = soco("train-and-export", "--model", shy, "--out", run, *FEW_STEPS, "--set", f"export.flavour={flavour}")
    assert done.code == 0, done.err  # the proof holds its logits against transformers', to the gates of float32
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["parity"]["export"]["prefill"]["max_logit_difference"] < 1e-4
    operators = json.loads((run / "evidence" / "onnx.json").read_text(encoding="utf-8"))["graph"]["ops"]
    assert ("GroupQueryAttention" in operators) == (flavour == "contrib")
    assert "shy" in (run / "report.md").read_text(encoding="utf-8")


def test_a_key_that_it_does_not_know_is_refused_before_training(shy: Path, tmp_path: Path) -> None:
    describe_shy()
    config = json.loads((shy / "config.json").read_text(encoding="utf-8"))
    (shy / "config.json").write_text(json.dumps({**config, "shy_layers": 3}), encoding="utf-8")
    done = soco("train-and-export", "--model", shy, "--out", tmp_path / "run", *FEW_STEPS)
    assert done.code == 2
    assert "shy_layers" in done.err
    assert not (tmp_path / "run" / "scores.safetensors").exists()
