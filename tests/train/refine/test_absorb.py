"""Projected values against plain float64: exact at full size, best for one head, and the loss as it is said."""

from __future__ import annotations

import pytest
import torch

from soco_train.refine.absorb import absorb, value_projections

M, SIZE, TOKENS = 24, 8, 300


def drawn(heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return o_proj's weight, its inputs [tokens, heads · SIZE], their covariance, and an output curvature."""
    width = heads * SIZE
    # channels that differ tenfold: of a mixture by chance some are so nearly singular that no digit is left to compare
    left, right = (torch.linalg.qr(torch.randn(width, width, dtype=torch.float64))[0] for _ in range(2))
    mix = width**0.5 * left * torch.logspace(-1, 0, width, dtype=torch.float64) @ right
    inputs = torch.randn(TOKENS, width, dtype=torch.float64) @ mix
    gradients = torch.randn(TOKENS, M, dtype=torch.float64) * torch.rand(M)
    weight = torch.randn(M, width, dtype=torch.float64)
    return weight, inputs, inputs.T @ inputs / TOKENS, gradients.T @ gradients / TOKENS


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (6, 2), (4, 4)])
def test_exact_with_as_many_numbers_as_before(heads: int, groups: int) -> None:
    weight, _, covariance, curvature = drawn(heads)
    found = absorb(weight, covariance, curvature, value_projections(weight, covariance, curvature, groups, SIZE, SIZE))
    torch.testing.assert_close(found.folded(), weight)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_no_other_projection_of_one_head_loses_less(rank: int) -> None:
    weight, _, covariance, curvature = drawn(1)
    ours = absorb(weight, covariance, curvature, value_projections(weight, covariance, curvature, 1, SIZE, rank))
    near = [ours.down + 0.1 * torch.randn_like(ours.down) for _ in range(20)]
    for other in near + [torch.randn_like(ours.down) for _ in range(20)]:
        assert ours.lost < absorb(weight, covariance, curvature, other).lost


def test_the_loss_and_the_attention_are_what_is_said() -> None:
    heads, groups, rank, tokens, width = 6, 2, 5, 20, 10
    weight, inputs, covariance, curvature = drawn(heads)
    found = absorb(weight, covariance, curvature, value_projections(weight, covariance, curvature, groups, SIZE, rank))
    error = inputs @ (weight - found.folded()).T
    assert found.lost == pytest.approx(float((error @ curvature * error).sum(1).mean()))

    # attention with the small values, head by head, gives what the folded weight gives on the whole ones
    value, x = torch.randn(groups * SIZE, width, dtype=torch.float64), torch.randn(tokens, width, dtype=torch.float64)
    weights = torch.randn(heads, tokens, tokens, dtype=torch.float64).softmax(-1)

    def attended(matrix: torch.Tensor, size: int) -> torch.Tensor:
        values = (x @ matrix.T).reshape(tokens, groups, size).repeat_interleave(heads // groups, 1)
        return torch.einsum("hts,shd->thd", weights, values).reshape(tokens, heads * size)

    small = attended(found.value(value), rank) @ found.output.T
    torch.testing.assert_close(small, attended(value, SIZE) @ found.folded().T)
