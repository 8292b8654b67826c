"""Muon's step against the singular vectors of its gradient, in float64; what it is given, and what it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soco_train.errors import RecipeError
from soco_train.learn.optimiser import check_optimiser, optimisers

HAS_MUON = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch has Muon from 2.9 on")


@HAS_MUON
@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_a_step_of_muon_is_as_long_in_every_singular_direction_of_the_gradient(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    parameter, rank = nn.Parameter(torch.randn(shape)), min(shape)
    left, right = (torch.linalg.qr(torch.randn(size, rank)).Q.double() for size in shape)
    parameter.grad = (left * torch.logspace(0, -1, rank) @ right.T).float()
    before = parameter.detach().clone()
    (muon,) = optimisers("muon", [parameter], lr=0.01)
    muon.step()
    step = (before - parameter.detach()).double()
    size = 0.01 * 0.2 * max(shape) ** 0.5
    along = (left.T @ step @ right) / size
    assert float(along.diagonal().min()) > 0.6, "five iterations take a singular value of 0.1 this close to 1"
    assert float(along.diagonal().max()) < 1.3
    assert float((along - along.diagonal().diag()).abs().max()) < 0.05
    rms = float(step.square().mean().sqrt())
    assert rms == pytest.approx(0.01 * 0.2, rel=0.35), "as long as AdamW's steps are"


@HAS_MUON
def test_biases_get_adamw_and_every_parameter_one_optimiser() -> None:
    layer = nn.Linear(6, 5)
    muon, adamw = optimisers("muon", layer.parameters(), lr=0.1)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(layer.weight)]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [id(layer.bias)]
    (alone,) = optimisers("adamw", layer.parameters(), lr=0.1)
    assert len(alone.param_groups[0]["params"]) == 2


def test_a_pytorch_without_muon_is_told_of_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon", raising=False)
    check_optimiser("adamw")
    with pytest.raises(RecipeError, match=r"torch 2\.9") as caught:
        check_optimiser("muon")
    assert "refine.distill.optimiser" in str(caught.value)
