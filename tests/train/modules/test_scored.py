"""ScoredLinear against autograd and float64 finite differences, for plain and whitened bases."""

import pytest
import torch
from torch import nn

from soco_train.modules.scored import ScoreBank, ScoredLinear, ScoredProduct
from soco_train.store.spectra import Spectrum


def spectrum(weight: torch.Tensor, whitened: bool) -> Spectrum:
    n = weight.shape[1]
    factor = (
        torch.linalg.cholesky(torch.cov(torch.randn(n, 4 * n, dtype=weight.dtype)) + 0.1 * torch.eye(n))
        if whitened
        else torch.eye(n)
    )
    factor = factor.to(weight.dtype)
    u, sigma, v = torch.linalg.svd(weight @ factor, full_matrices=False)
    return Spectrum(u * sigma, v @ torch.linalg.inv(factor), sigma)


@pytest.mark.parametrize("whitened", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (6, 6)])
def test_gradients_match_finite_differences(whitened: bool, shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, dtype=torch.float64)
    parts = spectrum(weight, whitened)
    x = torch.randn(6, shape[1], dtype=torch.float64, requires_grad=True)
    s = torch.rand(min(shape), dtype=torch.float64, requires_grad=True)
    d = torch.randn(shape[0], dtype=torch.float64, requires_grad=True)
    for inputs in ((x, s, parts.P, parts.B, d), (x, s, parts.P, parts.B, None)):
        assert torch.autograd.gradcheck(ScoredProduct.apply, inputs, atol=1e-7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("deviation", [False, True])
def test_the_layer_is_the_sum_of_its_scored_components(bias: bool, deviation: bool) -> None:
    linear = nn.Linear(6, 8, bias=bias).double()
    parts = spectrum(linear.weight.detach(), True)
    layer = ScoredLinear(linear, parts, torch.float64)
    layer.s, layer.d = torch.rand(6, dtype=torch.float64), torch.randn(8, dtype=torch.float64) if deviation else None
    x = torch.randn(2, 4, 6, dtype=torch.float64)
    expected = x @ (parts.P @ torch.diag(layer.s) @ parts.B).T
    for shift in (layer.d, linear.bias):
        expected = expected if shift is None else expected + shift
    assert torch.allclose(layer(x), expected, atol=1e-12)


def layer_and_reference(m: int = 8, n: int = 6) -> tuple[ScoredLinear, nn.Linear]:
    linear = nn.Linear(n, m).double()
    return ScoredLinear(linear, spectrum(linear.weight.detach(), True), torch.float64), linear


def test_full_scores_are_the_dense_layer() -> None:
    layer, linear = layer_and_reference()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.allclose(layer(x), linear(x), atol=1e-12)


def test_compaction_leaves_the_output_of_the_survivors() -> None:
    layer, _ = layer_and_reference()
    x = torch.randn(4, 6, dtype=torch.float64)
    support = torch.tensor([True, False, True, True, False, True])
    layer.s = torch.rand(6, dtype=torch.float64) * support
    before = layer(x)
    layer.compact(support)
    assert layer.P.shape == (8, 4)
    assert torch.allclose(layer(x), before, atol=1e-12)


def test_a_layer_left_dense_answers_as_the_dense_one_whatever_its_scores() -> None:
    layer, linear = layer_and_reference()
    layer.s, layer.d = torch.rand(6, dtype=torch.float64), torch.ones(8, dtype=torch.float64)
    layer.compact(torch.ones(6, dtype=torch.bool))
    x = torch.randn(4, 6, dtype=torch.float64)
    assert torch.equal(layer(x), linear(x))
    assert layer.P.numel() == layer.B.numel() == 0


@pytest.mark.parametrize("function", ["relu", "softplus", "sigmoid2"])
def test_bank_starts_at_one_and_takes_any_scores(function: str) -> None:
    layers = {"a": layer_and_reference()[0], "b": layer_and_reference(4, 6)[0]}
    bank = ScoreBank(layers, function, deviation=True)
    assert torch.allclose(bank.scores(), torch.ones(10), atol=1e-5)
    wanted = torch.rand(10) + 0.1
    bank.set_scores(wanted)
    bank.install()
    assert torch.allclose(torch.cat([layers["a"].s, layers["b"].s]), wanted, atol=1e-5)


def test_teacher_mode_ignores_scores_and_records_no_gradient() -> None:
    layer, linear = layer_and_reference()
    bank = ScoreBank({"a": layer}, "relu", deviation=True)
    bank.set_scores(torch.zeros(6))
    bank.install()
    x = torch.randn(4, 6, dtype=torch.float64)
    with bank.teacher():
        taught = layer(x)
    assert torch.equal(taught, linear(x))
    assert not taught.requires_grad
    assert not torch.allclose(layer(x), taught)


def test_a_model_may_change_in_place_what_a_layer_returns() -> None:
    """OLMo clips queries, and Falcon adds attention to the MLP's output, in place."""
    linear = nn.Linear(5, 7).double()
    layer = ScoredLinear(linear, spectrum(linear.weight.detach(), False), torch.float64)
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.clamp_(-0.5, 0.5)
    (found,) = torch.autograd.grad(y.sum(), x)
    (expected,) = torch.autograd.grad(linear(x).clamp(-0.5, 0.5).sum(), x)
    torch.testing.assert_close(found, expected)
