"""Quantised graphs equal PyTorch with the rounded weights; rounding is what its docstring says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_train.numbers.blocks import Grid
from soco_train.settings.rounding import BITS
from tests.support import fresh
from tests.support.blocks import dequantize, quantize
from tests.support.decoders import Decoder, factor, save_dense, tiny_model, torch_logits

FORMS = {"q_proj": ("stacked", 21), "k_proj": ("pivoted", 9)}


def rounded(weight: torch.Tensor, bits: int, how: QuantizeSettings) -> torch.Tensor:
    stored = quantize(weight.detach().numpy(), Grid(bits, how.block, how.symmetric))
    return torch.from_numpy(dequantize(stored, bits, weight.shape[1]))


def round_model(model: torch.nn.Module, folder: Path, bits: int, how: QuantizeSettings) -> None:
    """Put into `model` what the quantised graph multiplies with: each stored matrix rounded on its own."""
    stored = load_file(folder / "model.safetensors")
    table = model.get_input_embeddings()
    width = table.weight.shape[1]
    divides = next(size for size in (256, 128, 64, 32, 16) if size <= how.block and width % size == 0)
    for name, linear in model.named_modules():
        if not isinstance(linear, torch.nn.Linear) or name in how.keep:
            continue
        if name == "lm_head" and linear.weight is table.weight and how.embedding != "same":
            continue
        first = rounded(stored.get(f"{name}.weight", linear.weight), bits, how)
        if f"{name}.up.weight" in stored:
            first = rounded(stored[f"{name}.up.weight"], bits, how) @ first
        elif f"{name}.mix.weight" in stored:
            rows = torch.cat([first, rounded(stored[f"{name}.mix.weight"], bits, how) @ first])
            first = torch.empty_like(rows).index_copy(0, stored[f"{name}.order"], rows)
        linear.weight = torch.nn.Parameter(first)
    if how.embedding != "same":
        symmetric = how.model_copy(update={"symmetric": True, "block": divides})
        # In place: a tied head follows its table.
        table.weight.data.copy_(rounded(table.weight, BITS[how.embedding], symmetric))


@pytest.mark.parametrize(
    ("bits", "symmetric", "block"), [(8, True, 32), (8, False, 16), (4, True, 32), (4, False, 64), (2, True, 32)]
)
@pytest.mark.parametrize(
    ("name", "embedding"), [("qwen2", "int8"), ("smollm2", "int8"), ("qwen3", "int4"), ("opt", "same")]
)
def test_graph_multiplies_with_the_rounded_factors(name, embedding, bits, symmetric, block, tmp_path: Path) -> None:
    how = QuantizeSettings(block=block, symmetric=symmetric, accuracy_level=1, embedding=embedding)
    model = tiny_model(name)
    folder = factor(model, tmp_path / "hf", FORMS)
    export_onnx(folder, tmp_path / "onnx", ExportSettings(weights=f"int{bits}", quantize=how))
    tokens = fresh.rng().integers(3, 96, (2, 12))
    mask = np.ones_like(tokens)
    exact = torch_logits(model, tokens, mask)
    round_model(model, folder, bits, how)
    expected = torch_logits(model, tokens, mask)
    got = Decoder(tmp_path / "onnx").step(tokens, mask)
    assert np.abs(got - expected).max() < 1e-3
    assert np.abs(exact - expected).max() > 1e-2


def test_kept_layers_are_not_rounded(tmp_path: Path) -> None:
    how = QuantizeSettings(keep=("lm_head", "*.q_proj", "*.mlp.*"), accuracy_level=1)
    model = tiny_model("llama")
    folder = factor(model, tmp_path / "hf", FORMS)
    summary = export_onnx(folder, tmp_path / "onnx", ExportSettings(weights="int4", quantize=how))
    assert summary.graph.ops["MatMulNBits"] == 2 * 4
    assert summary.graph.ops["MatMul"] == 2 * (2 + 3) + 1


def test_a_kept_layer_does_not_spare_those_it_would_be_packed_with(tmp_path: Path) -> None:
    how = QuantizeSettings(keep=("*.q_proj",))
    folder = save_dense(tiny_model("llama"), tmp_path / "hf")
    summary = export_onnx(folder, tmp_path / "onnx", ExportSettings(weights="int4", quantize=how, pack=True))
    assert summary.graph.ops["MatMul"] == 2
    assert summary.graph.ops["MatMulNBits"] == 2 * (3 + 1 + 1) + 1  # k, v, o; gate with up; down; the head


def test_a_tied_head_shares_a_quantised_table(tmp_path: Path) -> None:
    folder = save_dense(tiny_model("qwen3"), tmp_path / "hf")
    sizes = {}
    for embedding in ("int8", "int4"):
        how = QuantizeSettings(embedding=embedding)
        summary = export_onnx(folder, tmp_path / embedding, ExportSettings(weights="int4", quantize=how))
        sizes[embedding] = summary.graph.initializer_bytes
    assert sizes["int8"] - sizes["int4"] == pytest.approx(96 * 64 // 2, abs=64)


@pytest.mark.parametrize("block", [128, 256])
def test_a_table_is_shared_however_large_the_blocks_of_layers(block: int, tmp_path: Path) -> None:
    """Its block divides the width of 64; a copy for the head would be 96 · 64 bytes in int8."""
    model, how = tiny_model("qwen3"), QuantizeSettings(block=block, accuracy_level=1)
    folder = save_dense(model, tmp_path / "hf")
    summary = export_onnx(folder, tmp_path / "onnx", ExportSettings(weights="int8", quantize=how))
    of_layers = sum(-(-linear.in_features // block) * block * linear.out_features for linear in layers_of(model))
    assert of_layers + 96 * 64 < summary.graph.initializer_bytes < of_layers + 96 * 64 * 1.2 + of_layers * 0.1
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear) and name != "lm_head":
            linear.weight = torch.nn.Parameter(rounded(linear.weight, 8, how))
    table = model.get_input_embeddings().weight
    table.data.copy_(rounded(table, 8, how.model_copy(update={"block": 64})))
    tokens = fresh.rng().integers(3, 96, (1, 12))
    got = Decoder(tmp_path / "onnx").step(tokens, np.ones_like(tokens))
    assert np.abs(got - torch_logits(model, tokens, np.ones_like(tokens))).max() < 1e-3


def layers_of(model: torch.nn.Module) -> list[torch.nn.Linear]:
    return [part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear) and name != "lm_head"]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("n", [1, 31, 32, 97])
def test_rounding_error_is_at_most_half_a_step(bits, symmetric, n) -> None:
    weight = fresh.rng().standard_normal((5, n)).astype(np.float32)
    weight[2] = 0
    stored = quantize(weight, Grid(bits, 32, symmetric))
    steps = np.repeat(np.abs(stored.scales), 32, axis=1)[:, :n]
    # A symmetric range lacks the last level on one side: there the error may reach a whole step.
    # Scales are float16: where one was rounded down, the largest number is out of reach by as much of itself.
    limit = steps * (1.0 if symmetric else 0.5) + 2**-10 * np.abs(weight) + 1e-6
    found = dequantize(stored, bits, n)
    error = np.abs(found - weight)
    assert (error <= limit).all()
    assert (found[2] == 0).all()
    assert np.median(error / np.maximum(steps, 1e-9)) < 0.5
    assert stored.packed.shape == (5, -(-n // 32), 32 * bits // 8)


def test_rounding_in_pieces_is_rounding_at_once(monkeypatch) -> None:
    weight = fresh.rng().standard_normal((37, 70)).astype(np.float32)
    once = quantize(weight, Grid(4, 16, symmetric=False))
    monkeypatch.setattr("soco_export.onnx.write.blocks.CHUNK", 4 * 70 * 5)
    pieces = quantize(weight, Grid(4, 16, symmetric=False))
    assert (once.packed == pieces.packed).all()
    assert (once.scales == pieces.scales).all()
    assert (once.zeros == pieces.zeros).all()
