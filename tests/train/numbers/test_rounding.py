"""Rounding while the factors are trained: to the bit what the export stores, its gradient straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from soco_export.onnx.write.blocks import pack_levels
from soco_train.errors import RecipeError
from soco_train.numbers.blocks import Grid, nearest
from soco_train.numbers.rounding import check_rounding, of_layer, rounded, rounds
from soco_train.plan.rank_plan import BytePlan, LayerPlan, RankPlan
from soco_train.settings.rounding import BITS, RoundingSettings, WeightType
from tests.support import fresh
from tests.support.blocks import dequantize, quantize, unpack_levels


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("weights", ["int8", "int4", "int2"])
@pytest.mark.parametrize(("shape", "block"), [((7, 64), 32), ((5, 33), 16), ((3, 9), 32), ((4, 96), 64)])
def test_what_is_trained_is_what_the_export_stores(
    shape: tuple[int, int], block: int, weights: str, symmetric: bool
) -> None:
    weight = torch.randn(shape) * torch.logspace(-3, 1, shape[0])[:, None]
    weight[0] = 0
    weight[1] = weight[1].abs()
    settings = RoundingSettings(weights=weights, block=block, symmetric=symmetric)
    stored = quantize(weight.numpy(), Grid(BITS[weights], block, symmetric))
    assert np.array_equal(rounded(weight, settings).numpy(), dequantize(stored, BITS[weights], shape[1]))


def halves(scales: np.ndarray) -> np.ndarray:
    return scales.astype(np.float16).astype(np.float32)


def by_numpy(weight: np.ndarray, bits: int, block: int, symmetric: bool) -> tuple[np.ndarray, ...]:
    """What ONNX Runtime's own quantiser does, number by number, with scales that float16 has: levels, scales, zeros."""
    m, n = weight.shape
    padded = np.pad(weight, ((0, 0), (0, -n % block))).reshape(m, -1, block)
    low, high, top, half = padded.min(-1), padded.max(-1), 2**bits - 1, 2 ** (bits - 1)
    if symmetric:
        scales, zeros = halves(np.where(-low > high, low, high) / np.float32(-half)), np.full_like(low, half)
    else:
        scales = halves((np.maximum(high, 0) - np.minimum(low, 0)) / np.float32(top))
        zeros = np.clip(np.rint(-np.minimum(low, 0) / np.where(scales == 0, 1, scales)), 0, top)
    levels = np.rint(padded / np.where(scales == 0, 1, scales)[..., None]) + zeros[..., None]
    return np.clip(levels, 0, top), scales, zeros


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_nearest_is_to_the_bit_what_numpy_makes_of_the_formula(bits: int, symmetric: bool) -> None:
    weight = torch.randn(9, 75) * torch.logspace(-6, 3, 9)[:, None]
    weight[0] = 0
    found = nearest(weight, Grid(bits, 16, symmetric))
    for part, expected in zip(
        (found.levels, found.scales, found.zeros), by_numpy(weight.numpy(), bits, 16, symmetric), strict=True
    ):
        assert np.array_equal(part.numpy(), expected)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_comes_undone_and_the_first_level_has_the_lowest_bits(bits: int) -> None:
    levels = fresh.rng().integers(0, 2**bits, (3, 5, 13), dtype=np.uint8)
    packed = pack_levels(levels, bits)
    assert np.array_equal(unpack_levels(packed, bits)[..., :13], levels)
    assert np.array_equal(packed[..., 0] & (2**bits - 1), levels[..., 0])


def test_the_gradient_passes_straight_through() -> None:
    weight, along = torch.randn(6, 40, requires_grad=True), torch.randn(6, 40)
    (rounded(weight, RoundingSettings(weights="int4")) * along).sum().backward()
    assert torch.equal(weight.grad, along)


def test_layers_that_the_export_keeps_are_not_rounded() -> None:
    settings = RoundingSettings(weights="int4", keep=("*.down_proj",))
    assert rounds(settings, "model.layers.0.mlp.up_proj")
    assert not rounds(settings, "model.layers.0.mlp.down_proj")
    assert not rounds(RoundingSettings(), "model.layers.0.mlp.up_proj")


def test_each_layer_is_rounded_as_its_plan_has_it() -> None:
    shapes = {"a": (96, 64), "b": (64, 64), "c": (64, 64)}
    layers = {name: LayerPlan(shape, 64, True, 1, "") for name, shape in shapes.items()}
    kinds: dict[str, WeightType] = {"a": "int4", "b": "same", "c": "int8", "table": "int8"}
    chosen = BytePlan(9, 9, {"c": "pivoted"}, kinds, {"a": 64, "c": 32})
    plan = RankPlan(layers, 1.0, "stacked", "lagrangian", chosen)
    assert plan.rounding(RoundingSettings(weights="int8")) == RoundingSettings(weights="int8")
    settings = plan.rounding(RoundingSettings(weights="planned", keep=("d",)))
    # what is stored of a pivoted layer are other numbers than those that are trained
    assert [rounds(settings, name) for name in ("a", "b", "c", "d")] == [True, False, False, False]
    weight = torch.randn(4, 64)
    assert torch.equal(rounded(weight, of_layer(settings, "a")), nearest(weight, Grid(4, 64, True)).values())


def test_pivoted_storage_is_refused() -> None:
    check_rounding(RoundingSettings(), "pivoted")
    with pytest.raises(RecipeError, match="stacked"):
        check_rounding(RoundingSettings(weights="int4"), "pivoted")
