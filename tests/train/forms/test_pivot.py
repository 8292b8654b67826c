"""Pivoted factors against the matrix they stand for, over random, ill-conditioned and degenerate factors."""

from __future__ import annotations

import time

import pytest
import torch

from soco_train.forms.pivoted import (
    LARGEST,
    PivotedFactors,
    _swap_until_small,
    pivot_factors,
)
from soco_train.forms.stacked import StackedFactors
from soco_train.refine.cut import store_as
from soco_train.store.factors import Factors

SHAPES = [(40, 24, 10), (24, 40, 10), (32, 32, 31), (32, 32, 32), (9, 30, 9), (30, 9, 9), (20, 20, 1), (1, 5, 1)]


def spread(m: int, r: int, condition: float) -> torch.Tensor:
    """A random [m, r] matrix whose singular values fall evenly, on a log scale, from 1 to 1/condition."""
    left = torch.linalg.qr(torch.randn(m, r, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(r, r, dtype=torch.float64))[0]
    fall = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), r, dtype=torch.float64)
    return (left * fall @ right).float()


def relative_error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def unpivot(factors: PivotedFactors) -> torch.Tensor:
    pivot = factors.pivot.double()
    weight = torch.empty(len(factors.order), pivot.shape[1], dtype=torch.float64, device=pivot.device)
    weight[factors.order] = torch.cat([pivot, factors.mix.double() @ pivot])
    return weight


def check(factors: StackedFactors, tolerance: float = 1e-5) -> PivotedFactors:
    pivoted = pivot_factors(factors)
    (m, r), n = factors.up.shape, factors.down.shape[1]
    assert pivoted.pivot.shape == (r, n)
    assert pivoted.mix.shape == (m - r, r)
    assert pivoted.order.dtype == torch.int64
    assert sorted(pivoted.order.tolist()) == list(range(m))
    assert pivoted.pivot.numel() + pivoted.mix.numel() == r * (m + n - r)
    assert pivoted.growth() <= LARGEST * (1 + 1e-6)
    exact = factors.up.double() @ factors.down.double()
    assert relative_error(unpivot(pivoted), exact) < tolerance
    # The layer as it runs, in fp32: z = pivot x, y[order] = [z ; mix z].
    x = torch.randn(8, n)
    z = x @ pivoted.pivot.T
    y = torch.empty(8, m)
    y[:, pivoted.order] = torch.cat([z, z @ pivoted.mix.T], dim=1)
    assert relative_error(y, x.double() @ exact.T) < tolerance
    return pivoted


@pytest.mark.parametrize(("m", "n", "r"), SHAPES)
def test_random_factors(m, n, r):
    check(StackedFactors(torch.randn(m, r), torch.randn(r, n), None))


@pytest.mark.parametrize(("m", "n", "r"), SHAPES[:3])
@pytest.mark.parametrize("condition", [1e3, 1e6])
def test_ill_conditioned_factors(m, n, r, condition):
    check(StackedFactors(spread(m, r, condition), spread(n, r, condition).T.contiguous(), None))
    check(StackedFactors(spread(m, r, condition), torch.randn(r, n), None))
    check(StackedFactors(torch.randn(m, r), spread(n, r, condition).T.contiguous(), None))


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_does_not_matter(scale):
    check(StackedFactors(torch.randn(30, 12) * scale, torch.randn(12, 20), None))


def test_rows_of_very_different_size():
    rows = torch.logspace(-5, 5, 48)[torch.randperm(48)]
    check(StackedFactors(torch.randn(48, 16) * rows[:, None], torch.randn(16, 20), None))


def test_more_rank_asked_than_there_is():
    up = torch.randn(40, 5) @ torch.randn(5, 12)
    check(StackedFactors(up, torch.randn(12, 20), None), tolerance=1e-5)


def test_zero_and_repeated_rows():
    up = torch.randn(40, 12)
    up[7], up[20], up[21] = 0, up[3], -up[3]
    check(StackedFactors(up, torch.randn(12, 20), None))
    nothing = pivot_factors(StackedFactors(torch.zeros(8, 3), torch.randn(3, 6), None))
    assert not unpivot(nothing).any()


def test_bias_keeps_the_order_of_y_and_dtype_that_of_the_factors():
    bias = torch.randn(12)
    pivoted = pivot_factors(StackedFactors(torch.randn(12, 4).bfloat16(), torch.randn(4, 9).bfloat16(), bias))
    assert pivoted.bias is bias
    assert {pivoted.pivot.dtype, pivoted.mix.dtype} == {torch.bfloat16}


def test_the_inputs_are_left_alone():
    up, down = torch.randn(30, 10, dtype=torch.float64), torch.randn(10, 20, dtype=torch.float64)
    copies = up.clone(), down.clone()
    pivot_factors(StackedFactors(up.requires_grad_(), down, None))
    assert torch.equal(up, copies[0])
    assert torch.equal(down, copies[1])


def test_adversarial_growth_is_swapped_away():
    """On this matrix elimination with row pivoting alone leaves coefficients that grow like 2^r."""
    r = 20
    up = torch.cat([torch.eye(r) - torch.ones(r, r).tril(-1), -torch.ones(4, r)])
    pivoted = check(StackedFactors(up, torch.randn(r, 30), None))
    assert pivoted.growth() <= LARGEST * (1 + 1e-6)


def test_swaps_keep_the_coefficients_exact():
    """The rank-one update of a swap against solving for the coefficients anew."""
    up = torch.randn(60, 15, dtype=torch.float64)
    mix = up[15:] @ torch.linalg.inv(up[:15])
    order = _swap_until_small(torch.arange(60), mix)
    rows, rest = up[order[:15]], up[order[15:]]
    assert order[:15].tolist() != list(range(15))
    torch.testing.assert_close(mix @ rows, rest)


def test_the_published_size_and_quality_on_a_real_shape():
    """1536 x 576 at keep 0.6 (PIFA's code): 529,911 numbers, error 1.3e-6 in fp32 and 9.8e-4 in fp16, |mix| ≤ 1.13."""
    start = time.process_time()
    u, sigma, v = torch.linalg.svd(torch.randn(1536, 576), full_matrices=False)
    control = time.process_time() - start
    factors = StackedFactors(u[:, :291] * sigma[:291].sqrt(), sigma[:291].sqrt()[:, None] * v[:291], None)
    start = time.process_time()
    pivoted = pivot_factors(factors)
    assert time.process_time() - start < 10 * control  # about as long as the SVD
    assert pivoted.pivot.numel() + pivoted.mix.numel() == 529_911
    exact = factors.up.double() @ factors.down.double()
    assert relative_error(unpivot(pivoted), exact) < 1.3e-6
    half = PivotedFactors(pivoted.pivot.half().float(), pivoted.mix.half().float(), pivoted.order, None)
    assert relative_error(unpivot(half), exact) < 1.2e-3
    assert pivoted.growth() < 1.13


def test_pivots_are_chosen_when_a_layer_is_asked_for_and_saved_one_layer_at_a_time(tmp_path, monkeypatch) -> None:
    asked = []
    monkeypatch.setattr(
        "soco_train.forms.pivoted.pivot_factors", lambda layer: asked.append(layer) or pivot_factors(layer)
    )
    factors = {name: StackedFactors(spread(24, 7, 1e3), torch.randn(7, 16), torch.randn(24)) for name in ("a", "b")}
    stored = Factors(store_as(factors, "pivoted"), {"seed": 3})
    assert not asked
    stored.save(tmp_path / "factors.safetensors")
    assert asked == list(factors.values())
    found = Factors.load(tmp_path / "factors.safetensors")
    assert found.provenance == {"seed": 3}
    for name, layer in factors.items():
        for part, tensor in vars(pivot_factors(layer)).items():
            assert torch.equal(getattr(found.layers[name], part), tensor)
    assert store_as(factors, "stacked") is factors
