"""Calibrated rounding against brute force, against nearest, and against itself."""

from __future__ import annotations

import itertools

import pytest
import torch

from soco_train.errors import RecipeError
from soco_train.numbers.blocks import Grid, Levels, nearest
from soco_train.numbers.feedback import calibrated, curvature, row_errors
from soco_train.numbers.pair import balanced, calibrated_pair, chain_error, mixed
from soco_train.numbers.rules import Inputs, find_rounding

GRIDS = [Grid(4, 32, True), Grid(4, 16, False), Grid(2, 32, False), Grid(2, 16, True), Grid(8, 64, True)]


def covariance(n: int, tokens: int = 400) -> torch.Tensor:
    """Inputs as a language model has them: correlated, a few channels far larger than the others."""
    x = torch.randn(tokens, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64) / n**0.5
    x *= torch.logspace(0, 1.5, n, dtype=torch.float64)[torch.randperm(n)]
    return x.T @ x / tokens


def total(weight: torch.Tensor, found: Levels, C: torch.Tensor) -> float:
    return float(row_errors(weight.double(), found.values().double(), C).sum())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_no_row_is_worse_than_nearest_and_the_whole_is_much_better(grid: Grid) -> None:
    weight, C = torch.randn(24, 112, dtype=torch.float64), covariance(112)
    found = calibrated(weight, grid, curvature(C, torch.float64))
    plain = nearest(weight, grid)
    rows = row_errors(weight, found.values(), C) / row_errors(weight, plain.values(), C)
    assert rows.max() <= 1 + 1e-9
    assert total(weight, found, C) < 0.6 * total(weight, plain, C)
    assert found.levels.min() >= 0
    assert found.levels.max() <= grid.top
    assert torch.equal(found.levels, found.levels.round())
    if grid.symmetric:
        assert (found.zeros == grid.half).all()


def test_float32_is_as_good_as_the_float64_reference() -> None:
    weight, C, grid = torch.randn(24, 112), covariance(112), Grid(4, 32, True)
    single = calibrated(weight, grid, curvature(C))
    double = calibrated(weight.double(), grid, curvature(C, torch.float64))
    assert total(weight, single, C) == pytest.approx(total(weight, double, C), rel=0.1)


def test_close_to_the_best_levels_that_there_are() -> None:
    """All 4^6 roundings of each row on the scale that was found: the one chosen is (nearly) the best of them."""
    grid, lost = Grid(2, 16, True), []
    options = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.float64)
    for _ in range(240):
        weight, C = torch.randn(1, 6, dtype=torch.float64), covariance(6)
        found = calibrated(weight, grid, curvature(C, torch.float64))
        values = (options - grid.half) * found.scales[0, 0]
        errors = row_errors(weight, values, C)
        closest = (values - weight).square().sum(1).argmin()
        lost.append([total(weight, found, C) / float(errors.min()), float(errors[closest] / errors.min())])
    feedback, alone = torch.tensor(lost).T
    assert feedback.min() >= 1 - 1e-9
    assert feedback.median() < 1.2 < 1.4 < alone.median()


def test_uncorrelated_inputs_leave_nothing_to_feed_back() -> None:
    known = curvature(torch.eye(40, dtype=torch.float64) * 3)
    assert known.spread == pytest.approx(1)
    assert not known.feedback.any()


def test_inputs_that_never_fire_are_rounded_all_the_same() -> None:
    weight, C = torch.randn(6, 40), covariance(40)
    C[3], C[:, 3] = 0, 0
    assert calibrated(weight, Grid(4, 16, True), curvature(C)).values().isfinite().all()
    assert calibrated(weight, Grid(4, 16, True), curvature(torch.zeros(40, 40))).values().isfinite().all()


def test_equal_input_gives_equal_bits() -> None:
    weight, C = torch.randn(16, 70), covariance(70)
    one, two = (calibrated(weight, Grid(4, 32, True), curvature(C)) for _ in range(2))
    assert torch.equal(one.levels, two.levels)
    assert torch.equal(one.scales, two.scales)


def pair(m: int = 72, n: int = 96, r: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    C = covariance(n)
    sigma = torch.logspace(1, -1, r, dtype=torch.float64)
    down = torch.linalg.solve_triangular(
        torch.linalg.cholesky(C), torch.linalg.qr(torch.randn(n, r, dtype=torch.float64))[0].T, upper=False, left=False
    )
    return (down * sigma[:, None].sqrt()).float(), torch.randn(m, r) * sigma.sqrt().float(), C


@pytest.mark.parametrize("change", [balanced, lambda down, up, _: mixed(down.double(), up.double())])
def test_what_stands_between_the_factors_leaves_their_product(change) -> None:
    down, up, C = pair()
    new_down, new_up = change(down, up, C)
    assert torch.allclose(new_up @ new_down, up.double() @ down.double(), atol=1e-8)


def test_balanced_factors_have_components_that_do_not_meet() -> None:
    down, up, C = pair()
    down, up = balanced(down, up, C)
    # n ε |A| |C| |Aᵀ| bounds the rounding of A C Aᵀ: where C is nearly singular, rows of `down` are long and cancel
    near = len(C) * torch.finfo(torch.float64).eps * float((down.abs() @ C.abs() @ down.abs().T).max())
    for gram in (up.T @ up, down @ C @ down.T):
        assert torch.allclose(gram, gram.diagonal().diag(), atol=near)
    assert torch.allclose((up.T @ up).diagonal(), (down @ C @ down.T).diagonal(), atol=near)


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_a_pair_is_rounded_better_than_its_factors_alone(grid: Grid) -> None:
    down, up, C = pair()
    known, target = curvature(C), up.double() @ down.double()
    plain = nearest(down, grid).values(), nearest(up, grid).values()
    seen = curvature(down.double() @ C @ down.double().T)
    alone = calibrated(down, grid, known).values(), calibrated(up, grid, seen).values()
    found = tuple(part.values() for part in calibrated_pair(down, up, grid, known, C))
    errors = [chain_error(option, C, target) for option in (found, alone, plain)]
    assert errors[0] < 0.8 * errors[1]
    assert errors[0] < 0.5 * errors[2]


def test_a_pair_that_lies_on_its_grid_stays_there() -> None:
    grid = Grid(4, 16, True)
    down, up, C = pair()
    down, up = nearest(down, grid).values(), nearest(up, grid).values()
    down, up = nearest(down, grid).values(), nearest(up, grid).values()
    found = calibrated_pair(down, up, grid, curvature(C), C)
    assert chain_error((found[0].values(), found[1].values()), C, up.double() @ down.double()) < 1e-9


def test_a_pair_of_one_component() -> None:
    down, up, C = torch.randn(1, 40), torch.randn(9, 1), covariance(40)
    found = calibrated_pair(down, up, Grid(4, 16, True), curvature(C), C)
    assert found[1].values().shape == (9, 1)


def test_rules_are_found_by_name() -> None:
    down, up, C = pair()
    inputs = Inputs(C, curvature(C), 400)
    for name, chain in itertools.product(("nearest", "calibrated"), ([down], [down, up])):
        found = find_rounding(name).layer(chain, Grid(4, 32, True), inputs)
        assert [part.values().shape for part in found] == [matrix.shape for matrix in chain]
    with pytest.raises(RecipeError, match="nearest, calibrated"):
        find_rounding("gptq")
