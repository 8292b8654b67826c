"""Muon's step against the singular vectors of its gradient, in float64; what it is given, and what it is not."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soco_train.errors import RecipeError
from soco_train.optimiser import check_optimiser, optimisers


@pytest.mark.parametrize("shape", [(48, 20), (20, 48), (32, 32)])
def test_a_step_of_muon_is_as_long_in_every_singular_direction_of_the_gradient(shape: tuple[int, int]) -> None:
    parameter = nn.Parameter(torch.randn(shape))
    before, gradient = parameter.detach().clone(), torch.randn(shape) @ torch.diag(torch.logspace(0, -1, shape[1]))
    parameter.grad = gradient.clone()
    (muon,) = optimisers("muon", [parameter], lr=0.01)
    muon.step()
    step = (before - parameter.detach()).double()
    left, _, right = torch.linalg.svd(gradient.double(), full_matrices=False)
    size = 0.01 * 0.2 * max(shape) ** 0.5
    along = (left.T @ step @ right.T) / size
    assert float(along.diagonal().min()) > 0.6, "five iterations take a singular value of 0.1 this close to 1"
    assert float(along.diagonal().max()) < 1.3
    assert float((along - along.diagonal().diag()).abs().max()) < 0.05
    rms = float(step.square().mean().sqrt())
    assert rms == pytest.approx(0.01 * 0.2, rel=0.35), "as long as AdamW's steps are"


def test_biases_get_adamw_and_every_parameter_one_optimiser() -> None:
    layer = nn.Linear(6, 5)
    muon, adamw = optimisers("muon", layer.parameters(), lr=0.1)
    assert [id(p) for p in muon.param_groups[0]["params"]] == [id(layer.weight)]
    assert [id(p) for p in adamw.param_groups[0]["params"]] == [id(layer.bias)]
    (alone,) = optimisers("adamw", layer.parameters(), lr=0.1)
    assert len(alone.param_groups[0]["params"]) == 2


def test_a_pytorch_without_muon_is_told_of_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    check_optimiser("adamw")
    with pytest.raises(RecipeError, match=r"torch 2\.9") as caught:
        check_optimiser("muon")
    assert "refine.distill.optimiser" in str(caught.value)
