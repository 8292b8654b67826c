"""Numbers that are none are found wherever they are stored, and named with their layer."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from soco_train.errors import DataError
from soco_train.forms.stacked import StackedFactors
from soco_train.numbers.faults import check_numbers, number_fault
from soco_train.store.factors import Factors
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum, SpectrumStore

NONE = [math.nan, math.inf, -math.inf]
LAYER = "model.layers.3.mlp.up_proj"


def planted(value: float, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found = torch.randn(*shape)
    found.view(-1)[int(torch.randint(found.numel(), ()))] = value
    return found.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", NONE)
def test_one_number_that_is_none_is_found_and_counted(value: float, dtype: torch.dtype) -> None:
    assert number_fault(planted(value, 5, 7, dtype=dtype)) == "NaN or infinity in 1 of 35 values"
    assert number_fault(planted(value, 9, dtype=dtype)) == "NaN or infinity in 1 of 9 values"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_ordinary_numbers_have_no_fault_in_any_type(dtype: torch.dtype) -> None:
    for tensor in (torch.randn(4, 6), torch.zeros(4, 6), torch.empty(0, 3), torch.arange(5), torch.randn(3) * 1e-30):
        assert number_fault(tensor, dtype) == ""
    sparse = torch.zeros(4, 6)
    sparse[1, 2] = 1e-3
    assert number_fault(sparse, dtype) == ""


def test_a_matrix_of_subnormal_numbers_alone_is_one_and_a_bias_is_not() -> None:
    tiny = torch.full((3, 4), 1e-40)
    assert "subnormal" in number_fault(tiny)
    assert number_fault(tiny[0]) == ""
    tiny[0, 0] = 1.0
    assert number_fault(tiny) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_weight_whose_square_is_infinite_in_float32_is_named(dtype: torch.dtype) -> None:
    large = torch.randn(4, 6).to(dtype)
    large[1, 5] = -1e20
    assert "its square" in number_fault(large)
    assert number_fault(large[1]) == ""  # a mask or a bias of the logits may be as large
    large[1, 5] = -1e19
    assert number_fault(large) == ""


def test_what_half_precision_has_no_room_for_is_named_for_it_alone() -> None:
    large, small = torch.randn(4, 6), torch.full((4, 6), 1e-9)
    large[2, 3] = -70000
    assert "65504" in number_fault(large, torch.float16)
    assert "round to 0" in number_fault(small, torch.float16)
    for dtype in (None, torch.float32, torch.bfloat16):
        assert number_fault(large, dtype) == number_fault(small, dtype) == ""
    large[2, 3] = 65519  # rounds to the largest number of float16
    assert number_fault(large, torch.float16) == ""


def test_a_fault_is_an_error_with_the_name() -> None:
    whole = torch.randn(3, 3)
    assert check_numbers("a", whole) is whole
    with pytest.raises(DataError, match=f"{LAYER} holds NaN") as raised:
        check_numbers(LAYER, planted(math.nan, 3, 3))
    assert raised.value.where == LAYER
    assert raised.value.fix


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("part", ["P", "B", "sigma"])
def test_a_spectrum_that_holds_none_is_not_written(part: str, value: float, tmp_path: Path) -> None:
    parts = {"P": torch.randn(6, 4), "B": torch.randn(4, 5), "sigma": torch.randn(4)}
    parts[part] = planted(value, *parts[part].shape)
    with pytest.raises(DataError, match=f"{part} of {LAYER} holds NaN or infinity"):
        SpectrumStore(tmp_path).put(LAYER, Spectrum(**parts))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("part", ["importance", "scale", "deviation"])
def test_scores_that_hold_none_are_not_written(part: str, value: float, tmp_path: Path) -> None:
    parts = {"importance": torch.randn(4), "scale": torch.randn(4), "deviation": torch.randn(6)}
    parts[part] = planted(value, len(parts[part]))
    whole = LayerScores(torch.randn(4), torch.randn(4), torch.randn(6), (6, 4))
    scores = Scores({"other": whole, LAYER: LayerScores(**parts, shape=(6, 4))})
    with pytest.raises(DataError, match=f"{LAYER} {part} holds NaN or infinity"):
        scores.save(tmp_path / "scores.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", NONE)
@pytest.mark.parametrize("part", ["up", "down", "bias"])
def test_factors_that_hold_none_are_not_written(part: str, value: float, tmp_path: Path) -> None:
    parts = {"up": torch.randn(6, 2), "down": torch.randn(2, 4), "bias": torch.randn(6)}
    parts[part] = planted(value, *parts[part].shape)
    factors = Factors({LAYER: StackedFactors(**parts)})
    with pytest.raises(DataError, match=f"{part} of {LAYER} holds NaN or infinity"):
        factors.save(tmp_path / "factors.safetensors")
    assert list(tmp_path.iterdir()) == []
