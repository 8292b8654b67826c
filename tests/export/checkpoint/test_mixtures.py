"""Mixtures with pruned experts: Hugging Face folder, dense form and ONNX graph hold the model that was pruned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging import version

from soco_export import apply_factors, load_checkpoint, save_checkpoint, save_dense
from soco_export.checkpoint.layers import merge_dense
from soco_export.checkpoint.versions import config_in_both_forms
from soco_export.export import export_onnx
from soco_export.onnx.calibrate import KeptLevels, calibrate
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import DataError
from soco_train.events import silent
from soco_train.modules.experts import open_mixtures
from soco_train.modules.layers import select_linears
from soco_train.modules.sites import opened
from soco_train.settings.data import LayerSettings
from tests.support import decoders
from tests.support.models import random_layer
from tests.support.zoo import ZOO

pytestmark = pytest.mark.transformers
OLD = version.parse(transformers.__version__).major < 5
# transformers 4.57 holds these in one tensor a layer, or by names of its own
MIXTURES = ("qwen2_moe", "qwen3_moe", "olmoe", "glm4_moe") + (
    () if OLD else ("mixtral", "granitemoe", "phimoe", "gpt_oss")
)


def layers_of(model: Any, full: bool = False) -> dict[str, Any]:
    """Both forms in turn for all but a few experts; `full`: every component of the dense layer, so nothing changes."""
    with opened(model):
        linears = select_linears(model, LayerSettings())
        chosen = {name: linear for name, linear in linears.items() if ".experts.1." not in name}
        return {
            name: _whole(linear) if full else random_layer(("stacked", "pivoted")[index % 2], linear, 5, False)
            for index, (name, linear) in enumerate(chosen.items())
            if min(linear.weight.shape) > 5
        }


def _whole(linear: torch.nn.Linear) -> Any:
    from soco_train.forms.stacked import StackedFactors

    left, sigma, right = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    bias = None if linear.bias is None else linear.bias.detach().clone()
    return StackedFactors(left * sigma, right, bias)


def model_of(name: str) -> Any:
    decoders.CONFIGS.setdefault(name, ZOO[name])
    return decoders.tiny_model(name)


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens).logits


@pytest.mark.parametrize("name", MIXTURES)
def test_pruned_experts_reach_every_artefact(name: str, tmp_path: Path) -> None:
    model, tokens = model_of(name), torch.randint(3, 90, (2, 18))
    layers = layers_of(model)
    apply_factors(model, layers)
    expected = logits(model, tokens)
    save_checkpoint(model, None, tmp_path / "hf")
    back = load_checkpoint(tmp_path / "hf")
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-4, rtol=1e-4)
    back.save_pretrained(tmp_path / "again")  # by transformers' own hand
    torch.testing.assert_close(logits(load_checkpoint(tmp_path / "again"), tokens), expected, atol=1e-4, rtol=1e-4)
    save_dense(model, None, tmp_path / "dense")
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    torch.testing.assert_close(logits(plain, tokens), expected, atol=1e-4, rtol=1e-4)
    merge_dense(back)
    assert not any(open_mixtures(back))
    assert back.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(logits(back, tokens), expected, atol=1e-4, rtol=1e-4)
    export_onnx(tmp_path / "hf", tmp_path / "onnx", ExportSettings())
    found = decoders.Decoder(tmp_path / "onnx").step(tokens.numpy(), np.ones((2, 18), np.int64))
    assert np.abs(found - expected.numpy()).max() < 1e-5 * float(expected.abs().max())


def test_experts_of_full_rank_change_nothing() -> None:
    model, tokens = model_of("qwen3_moe"), torch.randint(3, 90, (2, 18))
    expected = logits(model, tokens)
    apply_factors(model, layers_of(model, full=True))
    torch.testing.assert_close(logits(model, tokens), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(OLD, reason="the experts are apart")
def test_factors_of_another_model_leave_a_mixture_closed() -> None:
    model = model_of("mixtral")
    layers = layers_of(model)
    layers["model.layers.0.mlp.experts.9.up_proj"] = next(iter(layers.values()))
    with pytest.raises(DataError, match=r"experts\.9"):
        apply_factors(model, layers)
    assert not any(open_mixtures(model))


def test_an_expert_that_hardly_a_token_chooses_is_rounded_to_nearest(tmp_path: Path) -> None:
    """24 experts share 160 tokens, two a token: few have a covariance that says anything of 32 rows."""
    decoders.CONFIGS["crowd"] = ("qwen3_moe", {**ZOO["qwen3_moe"][1], "num_experts": 24, "num_hidden_layers": 1,
                                               "mlp_only_layers": []})  # fmt: skip
    model, tokens = decoders.tiny_model("crowd"), torch.randint(3, 90, (5, 32))
    save_checkpoint(model, None, tmp_path / "hf")
    visits: dict[str, int] = {}
    with opened(model):
        for name, linear in select_linears(model, LayerSettings()).items():
            linear.register_forward_hook(
                lambda _, args, __, name=name: visits.update({name: args[0].shape[:-1].numel()})
            )
        logits(model, tokens)
    settings = ExportSettings(weights="int8", quantize={"rule": "calibrated", "block": 16})
    found = calibrate(tmp_path / "hf", tokens, settings, KeptLevels(tmp_path / "kept"), silent)
    enough = {name for name in visits if ".experts." not in name or visits[name] >= 32}
    assert set(found.layers) - {"lm_head", "model.layers.0.mlp.gate"} == enough
    assert found.few >= 3 * 24 - len(enough)


def test_either_version_finds_the_number_of_experts() -> None:
    assert config_in_both_forms({"num_local_experts": 4}, tied=False)["num_experts"] == 4
    assert config_in_both_forms({"num_local_experts": 4, "num_experts": 5}, tied=False)["num_experts"] == 5
