"""A calibrated export: the graph multiplies with what was found, and what was found is better than nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from soco_export.export import ExportSummary, export_onnx
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_train.errors import DataError, RecipeError
from tests.support import fresh
from tests.support.decoders import Decoder, factor, save_dense, tiny_model, torch_logits

TEXT = torch.randint(3, 96, (24, 32))


def export(folder: Path, out: Path, rule: str, **changes) -> ExportSummary:
    how = QuantizeSettings(block=16, accuracy_level=1, embedding="same", rule=rule)
    return export_onnx(folder, out, ExportSettings(weights="int4", quantize=how, **changes), calibration=lambda: TEXT)


def losses(model: torch.nn.Module, *folders: Path) -> list[float]:
    """Return the mean squared differences of the logits over text that was not calibrated with."""
    tokens = fresh.rng().integers(3, 96, (4, 24))
    exact = torch_logits(model, tokens, np.ones_like(tokens))
    return [float(((Decoder(folder).step(tokens, np.ones_like(tokens)) - exact) ** 2).mean()) for folder in folders]


@pytest.mark.parametrize("name", ["llama", "smollm2", "opt"])
def test_calibrated_logits_are_closer(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    folder = factor(model, tmp_path / "hf", {"q_proj": ("stacked", 21), "fc1": ("stacked", 30)})
    for rule in ("nearest", "calibrated"):
        summary = export(folder, tmp_path / rule, rule)
    plain, found = losses(model, tmp_path / "nearest", tmp_path / "calibrated")
    assert found < 0.75 * plain
    sizes = [(tmp_path / rule / "model.onnx.data").stat().st_size for rule in ("nearest", "calibrated")]
    assert sizes[0] == sizes[1]
    assert summary.rounding is not None
    assert all(layer.error < layer.nearest for layer in summary.rounding.layers.values())
    pairs = {name for name, layer in summary.rounding.layers.items() if layer.kappa is not None}
    assert pairs == {name for name in summary.rounding.layers if name.endswith(("q_proj", "fc1"))}
    assert not list((tmp_path / "calibrated").glob("levels*"))


def test_packed_layers_take_the_same_levels(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = factor(model, tmp_path / "hf", {"q_proj": ("stacked", 21), "up_proj": ("stacked", 9)})
    tokens = fresh.rng().integers(3, 96, (2, 12))
    for pack in (False, True):
        export(folder, tmp_path / str(pack), "calibrated", pack=pack)
    got = [Decoder(tmp_path / str(pack)).step(tokens, np.ones_like(tokens)) for pack in (False, True)]
    assert np.abs(got[0] - got[1]).max() < 1e-4


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    folder = factor(tiny_model("llama"), tmp_path / "hf", {"q_proj": ("stacked", 21)})
    for number in "12":
        export(folder, tmp_path / number, "calibrated")
    one, two = ((tmp_path / number / "model.onnx.data").read_bytes() for number in "12")
    assert one == two


def test_pivoted_layers_and_what_reads_them_in_their_order_are_rounded_to_nearest(tmp_path: Path) -> None:
    model = tiny_model("llama")
    folder = factor(model, tmp_path / "hf", {"gate_proj": ("pivoted", 40), "q_proj": ("pivoted", 9)})
    summary = export(folder, tmp_path / "calibrated", "calibrated")
    assert summary.rounding is not None
    assert not [name for name in summary.rounding.layers if name.endswith(("gate_proj", "q_proj"))]
    export(folder, tmp_path / "nearest", "nearest")
    plain, found = losses(model, tmp_path / "nearest", tmp_path / "calibrated")
    assert found < 1.2 * plain


@pytest.mark.parametrize(("embedding", "block", "own"), [("int8", 16, False), ("int8", 32, True), ("same", 16, True)])
def test_a_tied_head_is_calibrated_where_it_has_blocks_of_its_own(embedding, block, own, tmp_path: Path) -> None:
    model = tiny_model("smollm2")  # 48 wide
    folder = save_dense(model, tmp_path / "hf")
    for rule in ("nearest", "calibrated"):
        how = QuantizeSettings(
            blocks={"*embed_tokens": block}, accuracy_level=1, embedding=embedding, rule=rule, keep=("*layers*",)
        )
        settings = ExportSettings(weights="int4", quantize=how)
        summary = export_onnx(folder, tmp_path / rule, settings, calibration=lambda: TEXT)
    assert summary.rounding is not None
    assert list(summary.rounding.layers) == ["lm_head"] * own
    plain, found = losses(model, tmp_path / "nearest", tmp_path / "calibrated")
    assert found < 0.9 * plain if own else found == pytest.approx(plain)


def test_kept_layers_are_left_alone(tmp_path: Path) -> None:
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    how = QuantizeSettings(rule="calibrated", keep=("lm_head", "*.mlp.*"))
    settings = ExportSettings(weights="int4", quantize=how)
    summary = export_onnx(folder, tmp_path / "onnx", settings, calibration=lambda: TEXT)
    assert summary.rounding is not None
    assert len(summary.rounding.layers) == 2 * 4
    assert summary.graph.ops["MatMulNBits"] == 2 * 4


def test_few_tokens_are_told_and_too_few_refused(tmp_path: Path) -> None:
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    for tokens, few in ((96, 2 * 7 + 1), (64 * 2, 2), (96 * 2, 0)):
        how = QuantizeSettings(rule="calibrated", calibration_tokens=tokens)
        settings = ExportSettings(weights="int4", quantize=how)
        summary = export_onnx(folder, tmp_path / str(tokens), settings, calibration=lambda: TEXT)
        assert summary.rounding is not None
        assert (summary.rounding.tokens, summary.rounding.few) == (tokens, few)
    with pytest.raises(DataError, match="64 tokens of calibration text cannot tell what 96 inputs"):
        export_onnx(folder, tmp_path / "none", settings, calibration=lambda: TEXT[:2])


def test_a_rule_that_needs_a_text_asks_for_one(tmp_path: Path) -> None:
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    settings = ExportSettings(weights="int4", quantize=QuantizeSettings(rule="calibrated"))
    with pytest.raises(RecipeError, match="no calibration text"):
        export_onnx(folder, tmp_path / "onnx", settings)
    unknown = ExportSettings(weights="int4", quantize=QuantizeSettings(rule="gptq"))
    with pytest.raises(RecipeError, match="nearest, calibrated"):
        export_onnx(folder, tmp_path / "onnx", unknown)
