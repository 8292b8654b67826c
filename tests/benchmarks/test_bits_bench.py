"""The benchmark of rounding: a model off its grid computes what it did, and the best learning rate is taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.bits.models import LEARNING_RATES, Subject
from benchmarks.bits.off_grid import BLOCK, moves, on_grid, rescale
from benchmarks.bits.run import forms, parse
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.settings.rounding import RoundingSettings
from tests.support.models import small_llama


def on_a_grid(weight: torch.Tensor) -> torch.Tensor:
    """Round to d · q + m, 16 values of q in each block, as a Q4_1 file has it."""
    blocks = weight.reshape(-1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    return (((blocks - low) / (high - low) * 15).round() / 15 * (high - low) + low).reshape(weight.shape)


def test_a_model_off_its_grid_computes_what_it_did() -> None:
    model = small_llama(hidden_size=64, intermediate_size=96)
    linears = select_linears(model, LayerSettings())
    for linear in linears.values():
        linear.weight.data = on_a_grid(linear.weight.detach())
    model.double()
    before = {name: linear.weight.detach().clone() for name, linear in linears.items()}
    tokens = torch.randint(64, (2, 16))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        rescale(model, 0.25, torch.Generator().manual_seed(int(torch.randint(1000, ()))))
        found = model(input_ids=tokens).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)  # its rotations are in float32
    assert on_grid(before.values()) == 1
    assert on_grid(linear.weight.detach() for linear in linears.values()) < 0.01
    for name, linear in linears.items():
        assert moves(before[name], linear.weight.detach()).median() > 0.15, name


def test_the_rate_of_least_divergence_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = LEARNING_RATES[int(torch.randint(len(LEARNING_RATES), ()))]

    def train(self: Subject, lr: float, rounding: RoundingSettings) -> tuple[Path, float]:
        return tmp_path / f"{lr:g}", abs(lr - best)

    monkeypatch.setattr(Subject, "_train", train)
    found = Subject(tmp_path, 1.0, torch.zeros(4, 8), 16, tmp_path).trained(RoundingSettings(weights="int4"))
    assert (found.lr, found.folder) == (best, tmp_path / f"{best:g}")
    assert set(found.divergences or {}) == {f"{lr:g}" for lr in LEARNING_RATES}


def test_what_was_distilled_in_fp32_is_not_trained_again(tmp_path: Path) -> None:
    options = parse(["dense=here", "--rules", "nearest", "trained", "--grids", "int4-32", "--out", str(tmp_path)])
    assert forms(options, distilled=False) == [("fp32", ""), ("int4-32", "nearest"), ("int4-32", "trained")]
    assert forms(options, distilled=True) == [("fp32", ""), ("int4-32", "nearest")]
