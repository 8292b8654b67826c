"""The damage to a layer against float64 sums over single tokens and factors rounded at each rank."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from soco_train.forms.registry import find_form, from_factors
from soco_train.numbers.blocks import Grid, nearest
from soco_train.numbers.feedback import calibrated, curvature, row_errors
from soco_train.scores.damage import LossNorm, RoundedInBlocks, damage_to, frequencies
from soco_train.settings.rounding import BITS
from soco_train.spectra.decompose import decompose
from soco_train.spectra.statistics import LayerStatistics
from soco_train.store.damage import DENSE
from soco_train.store.scores import LayerScores

M, N, T = 24, 32, 200
RULES = ("nearest", "calibrated")


@pytest.fixture(params=["plain", "whitened", "two-sided"])
def layer(request: pytest.FixtureRequest) -> tuple[nn.Linear, LayerStatistics, object, LayerScores, torch.Tensor]:
    linear = nn.Linear(N, M, bias=False)
    inputs, gradients = torch.randn(T, N).double() @ torch.randn(N, N).double(), torch.randn(T, M).double()
    statistics = LayerStatistics(inputs.T @ inputs / T, None, gradients.T @ gradients / T, None, T)
    spectrum = decompose(linear.weight, statistics, request.param, 1e-9)
    scores = LayerScores(spectrum.sigma**2, torch.ones(M), None, (M, N))
    return linear, statistics, spectrum, scores, inputs


def loss(error: torch.Tensor, statistics: LayerStatistics) -> float:
    """½ E[(δᵀ E x)²] with δ and x independent, term by term."""
    left, right = statistics.output_curvature, statistics.input_covariance
    assert left is not None
    assert right is not None
    return float(torch.einsum("ij,jk,kl,il->", left, error, right, error)) / 2


def test_a_dense_layer_loses_what_its_rounding_does_to_every_token(layer: tuple) -> None:  # type: ignore[type-arg]
    linear, statistics, spectrum, scores, _ = layer
    found = damage_to(linear, statistics, spectrum, scores, RoundedInBlocks((16,)))
    weight = linear.weight.detach()
    for weights, bits in BITS.items():
        error = (weight - nearest(weight, Grid(bits, 16, True)).values()).double()
        assert float(found.curves[DENSE, weights, 16][0]) == pytest.approx(
            loss(error, statistics), rel=1e-5
        )  # in float32
    assert float(found.curves[DENSE, "same", 0][0]) == 0


@pytest.mark.parametrize("weights", ["same", "int8", "int4", "int2"])
def test_a_pair_loses_what_was_counted_at_every_rank(layer: tuple, weights: str) -> None:  # type: ignore[type-arg]
    linear, statistics, spectrum, scores, _ = layer
    curve = damage_to(linear, statistics, spectrum, scores, RoundedInBlocks((16,))).curves[
        "stacked", weights, 16 if weights in BITS else 0
    ]
    weight = spectrum.P.double() @ spectrum.B.double()
    for rank in (16, M):  # whole blocks: the scales are then those of the longest factors
        balance = (spectrum.B.double().norm(dim=1) / spectrum.P.double().norm(dim=0)).sqrt()[:rank]
        up, down = spectrum.P[:, :rank].double() * balance, spectrum.B[:rank].double() / balance[:, None]
        if weights != "same":
            up, down = (nearest(part.float(), Grid(BITS[weights], 16, True)).values().double() for part in (up, down))
        assert float(curve[rank]) == pytest.approx(loss(weight - up @ down, statistics), rel=1e-4, abs=1e-9)


def test_a_pivoted_layer_loses_at_a_sampled_rank_what_its_rounded_rows_lose(layer: tuple) -> None:  # type: ignore[type-arg]
    linear, statistics, spectrum, scores, _ = layer
    curve = damage_to(linear, statistics, spectrum, scores, RoundedInBlocks((16,))).curves["pivoted", "int8", 16]
    rank = M * 3 // 8
    balance = (spectrum.B.norm(dim=1) / spectrum.P.norm(dim=0)).sqrt()[:rank]
    numbers = find_form("pivoted").of(spectrum.P[:, :rank] * balance, spectrum.B[:rank] / balance[:, None], None)
    grid = Grid(8, 16, True)
    rounded = {
        name: nearest(part, grid).values() if part is not None and part.is_floating_point() else part
        for name, part in vars(numbers).items()
    }
    exact = from_factors(numbers).dense_weight() - from_factors(type(numbers)(**rounded)).dense_weight()
    cut = linear.weight.detach().double() - from_factors(numbers).dense_weight()
    expected = loss(exact, statistics) + loss(cut, statistics)
    assert float(curve[rank]) == pytest.approx(expected, rel=1e-3)


def test_rounding_that_loses_less_is_priced_less_in_every_form_and_block(layer: tuple) -> None:  # type: ignore[type-arg]
    linear, statistics, spectrum, scores, _ = layer
    plain, better = (
        damage_to(linear, statistics, spectrum, scores, RoundedInBlocks((16, 32), rule=rule)) for rule in RULES
    )
    sample = calibrated(linear.weight.detach(), Grid(4, 32, True), curvature(statistics.input_covariance))
    rows = [
        float(row_errors(linear.weight.detach(), part.values(), statistics.input_covariance.float()).sum())
        for part in (sample, nearest(linear.weight.detach(), Grid(4, 32, True)))
    ]
    share = rows[0] / rows[1]
    assert share < 0.9
    exact = plain.curves["stacked", "same", 0]
    for block in (16, 32):
        assert float(better.curves[DENSE, "int4", block]) == pytest.approx(
            share * float(plain.curves[DENSE, "int4", block])
        )
        more, less = (found.curves["stacked", "int4", block] - exact for found in (plain, better))
        assert torch.allclose(less, share * more, rtol=1e-4, atol=1e-9)


def test_the_norm_is_the_mean_over_independent_tokens() -> None:
    x, delta, error = torch.randn(500, 5).double(), torch.randn(400, 4).double(), torch.randn(4, 5).double()
    norm = LossNorm(delta.T @ delta / 400, x.T @ x / 500)
    assert norm.error(error) == pytest.approx(float((delta @ error @ x.T).square().mean()) / 2)


def test_tokens_never_read_share_the_part_of_those_read_once() -> None:
    found = frequencies(torch.tensor([[0, 0, 0, 1]]), 4)
    assert torch.allclose(found, torch.tensor([0.75 * 0.75, 0.25 * 0.75, 0.125, 0.125]).double())
    assert float(frequencies(torch.randint(0, 50, (4, 40)), 90).sum()) == pytest.approx(1)
