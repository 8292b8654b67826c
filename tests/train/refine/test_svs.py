"""Flattened singular values against plain SVDs in float64."""

import pytest
import torch

from soco_train.forms.stacked import StackedFactors
from soco_train.refine.rungs import wanted_rungs
from soco_train.refine.svs import flattened
from soco_train.settings.refine import RefineSettings


@pytest.mark.parametrize("by", [0.0, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("m", "n", "r"), [(9, 14, 5), (14, 9, 9), (6, 6, 1)])
def test_singular_values_are_powers_at_the_same_norm_and_their_vectors_stay(m: int, n: int, r: int, by: float) -> None:
    factors = StackedFactors(torch.randn(m, r), torch.randn(r, n), torch.randn(m))
    u, sigma, v = torch.linalg.svd(factors.up.double() @ factors.down.double(), full_matrices=False)
    powers = sigma[:r] ** (1 - by)
    expected = u[:, :r] * (powers * sigma[:r].norm() / powers.norm()) @ v[:r]
    found = flattened(factors, by)
    product = found.up.double() @ found.down.double()
    torch.testing.assert_close(product, expected, rtol=0, atol=1e-5 * float(sigma[0]))
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert found.bias is factors.bias


def test_it_is_off_unless_asked_for_and_comes_before_what_is_trained() -> None:
    assert not wanted_rungs(RefineSettings())
    asked = RefineSettings.model_validate({"flatten": {"by": 0.5}, "distill": {"steps": 3}, "refit": {"blocks": 2}})
    assert [rung.name for rung in wanted_rungs(asked)] == ["refit", "flatten", "distill"]


def test_a_layer_of_zeros_stays_finite() -> None:
    found = flattened(StackedFactors(torch.zeros(4, 2), torch.zeros(2, 3), None), 0.5)
    assert torch.equal(found.up @ found.down, torch.zeros(4, 3))
