"""Layers in another layout than nn.Linear: opening a model keeps its map and its numbers, and can be undone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from soco_train.modules.layers import select_linears
from soco_train.modules.sites import as_stored, is_linear, open_sites, opened
from soco_train.settings.data import LayerSettings
from tests.support import decoders
from tests.support.zoo import ZOO


@pytest.fixture(params=["gpt2", "falcon-7b", "falcon-40b"])
def model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(decoders.CONFIGS, request.param, ZOO[request.param])
    return decoders.tiny_model(request.param)


@torch.no_grad()
def test_an_open_model_is_the_same_map_with_the_same_numbers(model: Any) -> None:
    tokens = torch.randint(3, 90, (2, 12))
    expected, before = model(tokens).logits, dict(model.named_modules())
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    with opened(model):
        torch.testing.assert_close(model(tokens).logits, expected)
        assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == pointers
        linears = select_linears(model, LayerSettings())
        inside = [name for name, tensor in model.named_parameters() if tensor.ndim == 2 and ".h." in name]
        assert [f"{name}.weight" for name in linears] == inside
        assert open_sites(model) == {}
    assert dict(model.named_modules()) == before


def test_a_subclass_that_computes_something_else_is_no_linear() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    class Named(nn.Linear):
        pass

    assert not is_linear(Doubled(3, 4))
    assert is_linear(Named(3, 4))
    assert not is_linear(nn.Conv1d(3, 4, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_the_way_back_to_a_layout_keeps_the_map(bias: bool) -> None:
    linear, x = nn.Linear(5, 7, bias), torch.randn(3, 5)
    stored = as_stored(linear, Conv1D)
    assert type(stored) is Conv1D
    assert stored.weight.shape == (5, 7)
    torch.testing.assert_close(stored(x), linear(x))
    assert as_stored(linear, nn.Linear) is linear
