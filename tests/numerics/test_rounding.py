"""Rounding while the factors are trained: to the bit what the export stores, its gradient straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soco_export.onnx.write.blocks import dequantize, quantize
from soco_train.errors import RecipeError
from soco_train.numbers.rounding import check_rounding, rounded, rounds
from soco_train.settings import BITS, RoundingSettings


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize(("shape", "block"), [((7, 64), 32), ((5, 33), 16), ((3, 9), 32), ((4, 96), 64)])
def test_what_is_trained_is_what_the_export_stores(
    shape: tuple[int, int], block: int, weights: str, symmetric: bool
) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    weight[0] = 0
    weight[1] = weight[1].abs()
    settings = RoundingSettings(weights=weights, block=block, symmetric=symmetric)
    stored = dequantize(quantize(weight.numpy(), BITS[weights], block, symmetric))
    assert np.array_equal(rounded(weight, settings).numpy(), stored)


def test_the_gradient_passes_straight_through() -> None:
    weight, along = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    (rounded(weight, RoundingSettings(weights="int4")) * along).sum().backward()
    assert torch.equal(weight.grad, along)


def test_layers_that_the_export_keeps_are_not_rounded() -> None:
    settings = RoundingSettings(weights="int4", keep=("*.down_proj",))
    assert rounds(settings, "model.layers.0.mlp.up_proj")
    assert not rounds(settings, "model.layers.0.mlp.down_proj")
    assert not rounds(RoundingSettings(), "model.layers.0.mlp.up_proj")


def test_pivoted_storage_is_refused() -> None:
    check_rounding(RoundingSettings(), "pivoted")
    with pytest.raises(RecipeError, match="stacked"):
        check_rounding(RoundingSettings(weights="int4"), "pivoted")
