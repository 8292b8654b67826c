"""Every basis against a full SVD in float64, and the stored product against the weight."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from soco_train.errors import DataError, RecipeError
from soco_train.events import Event
from soco_train.modules.layers import select_linears
from soco_train.modules.sites import open_sites
from soco_train.settings.data import LayerSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.bases import Metric, Roots, basis, find_basis
from soco_train.spectra.decompose import decompose, decompose_layers, decompose_model
from soco_train.spectra.statistics import LayerStatistics, collect_statistics, groups, sums_bytes
from soco_train.store.spectra import SpectrumStore

BASES = ["plain", "fisher", "fisher-inputs", "sparsity", "activation", "whitened", "two-sided"]
SHAPES = [(24, 24), (40, 16), (16, 40), (1, 7), (7, 1)]
RIDGE = 1e-6


def covariance(n: int, spread: float = 1.0) -> torch.Tensor:
    """A random covariance whose channels differ in scale by 10^±spread."""
    x = torch.randn(4 * n, n, dtype=torch.float64) @ torch.randn(n, n, dtype=torch.float64)
    x = x * 10 ** (spread * (2 * torch.rand(n, dtype=torch.float64) - 1))
    return x.T @ x / len(x)


def statistics_of(m: int, n: int) -> LayerStatistics:
    return LayerStatistics(
        input_covariance=covariance(n),
        input_magnitude=torch.rand(n, dtype=torch.float64) + 0.01,
        output_curvature=covariance(m),
        row_fisher=torch.rand(m, dtype=torch.float64) + 0.01,
        column_fisher=torch.rand(n, dtype=torch.float64) + 0.01,
        column_survivors=torch.randint(1, m + 1, (n,), dtype=torch.float64),
        tokens=4 * n,
    )


def metric_matrices(name: str, statistics: LayerStatistics, m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The left and right transform of a basis as full matrices, from the definition."""

    def damp(diagonal: torch.Tensor) -> torch.Tensor:
        return torch.diag((diagonal + RIDGE * diagonal.mean()).sqrt())

    def root(matrix: torch.Tensor) -> torch.Tensor:
        return torch.linalg.cholesky(matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)))

    left, right = torch.eye(m, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    if name == "fisher":
        left = damp(statistics.row_fisher)
    by_input = {"fisher-inputs": "column_fisher", "sparsity": "column_survivors", "activation": "input_magnitude"}
    if name in by_input:
        right = damp(getattr(statistics, by_input[name]))
    if name in ("whitened", "two-sided"):
        right = root(statistics.input_covariance)
    if name == "two-sided":
        left = root(statistics.output_curvature)
    return left.T, right


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_product_is_the_weight_and_sigma_its_spectrum_in_the_metric(name, m, n):
    weight, statistics = torch.randn(m, n), statistics_of(m, n)
    spectrum = decompose(weight, statistics, name, RIDGE)
    k = min(m, n)
    assert (spectrum.P.shape, spectrum.B.shape, spectrum.sigma.shape) == ((m, k), (k, n), (k,))
    assert {part.dtype for part in vars(spectrum).values()} == {torch.float32}
    assert (spectrum.sigma.diff() <= 0).all()
    left, right = metric_matrices(name, statistics, m, n)
    sigma = torch.linalg.svdvals(left @ weight.double() @ right)
    torch.testing.assert_close(spectrum.sigma.double(), sigma, rtol=1e-5, atol=1e-6 * float(sigma[0]))
    difference = left @ (spectrum.P.double() @ spectrum.B.double() - weight) @ right
    assert difference.norm() < 1e-6 * sigma.norm()
    torch.testing.assert_close(spectrum.P @ spectrum.B, weight, rtol=0, atol=1e-4 * float(weight.abs().max()))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("m", "n"), SHAPES[:3])
def test_a_cut_loses_exactly_the_cut_sigmas_in_the_metric(name, m, n):
    """Eckart-Young: P_r B_r is the best rank-r approximation under ‖leftᵀ ΔW right‖."""
    weight, statistics = torch.randn(m, n), statistics_of(m, n)
    spectrum = decompose(weight, statistics, name, RIDGE)
    left, right = metric_matrices(name, statistics, m, n)
    for r in (1, 5, 11):
        error = left @ (spectrum.P[:, :r].double() @ spectrum.B[:r].double() - weight) @ right
        assert float(error.norm()) == pytest.approx(float(spectrum.sigma[r:].double().norm()), rel=1e-4)


def test_whitened_sigma_is_the_output_energy_a_component_carries():
    x = torch.randn(300, 12, dtype=torch.float64) * torch.logspace(-2, 1, 12, dtype=torch.float64)
    weight = torch.randn(9, 12)
    spectrum = decompose(weight, LayerStatistics(input_covariance=x.T @ x / 300), "whitened", 0.0)
    z = x @ spectrum.B.double().T
    torch.testing.assert_close(z.T @ z / 300, torch.eye(9, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    energy = (x @ weight.double().T).square().sum() / 300
    assert float(spectrum.sigma.double().square().sum()) == pytest.approx(float(energy), rel=1e-5)


@pytest.mark.parametrize(("m", "n"), [(40, 32), (32, 40)])
def test_outlier_channels_and_ill_conditioned_weights_stay_exact_in_the_metric(m, n):
    inputs = covariance(n, spread=3)
    outliers = torch.ones(n, dtype=torch.float64)
    outliers[3] = 3000
    inputs = inputs * outliers * outliers[:, None]
    u, v = torch.linalg.qr(torch.randn(m, 32))[0], torch.linalg.qr(torch.randn(n, 32))[0]
    weight = u * torch.logspace(0, -6, 32) @ v.T
    spectrum = decompose(weight, LayerStatistics(input_covariance=inputs), "whitened", RIDGE)
    _, right = metric_matrices("whitened", LayerStatistics(input_covariance=inputs), m, n)
    error = (spectrum.P.double() @ spectrum.B.double() - weight) @ right
    assert error.norm() < 1e-6 * (weight.double() @ right).norm()
    torch.testing.assert_close(spectrum.P.norm(dim=0), spectrum.sigma, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize(("m", "n"), SHAPES[:3])
def test_rank_deficient_and_zero_weights(name, m, n):
    statistics = statistics_of(m, n)
    for rank in (0, 3):
        weight = torch.randn(m, rank) @ torch.randn(rank, n)
        spectrum = decompose(weight, statistics, name, RIDGE)
        assert all(part.isfinite().all() for part in vars(spectrum).values())
        torch.testing.assert_close(spectrum.P @ spectrum.B, weight, rtol=0, atol=1e-4)
        assert (spectrum.sigma[rank:] <= 1e-6 * spectrum.sigma[0]).all()


def test_silent_channels_leave_the_metric_regular():
    magnitude, fisher = torch.rand(10, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    magnitude[4], fisher[2] = 0, 0
    weight = torch.randn(8, 10)
    for statistics, name in (
        (LayerStatistics(input_magnitude=magnitude), "activation"),
        (LayerStatistics(row_fisher=fisher), "fisher"),
        (LayerStatistics(column_fisher=magnitude), "fisher-inputs"),
        (LayerStatistics(input_magnitude=torch.zeros_like(magnitude)), "activation"),
        (LayerStatistics(input_covariance=torch.zeros(10, 10, dtype=torch.float64)), "whitened"),
    ):
        spectrum = decompose(weight, statistics, name, RIDGE)
        torch.testing.assert_close(spectrum.P @ spectrum.B, weight, rtol=0, atol=2e-3)


def test_roots_are_shared_by_object_and_only_a_few_are_kept(monkeypatch):
    calls = []
    factorise = torch.linalg.cholesky_ex
    monkeypatch.setattr(torch.linalg, "cholesky_ex", lambda matrix: calls.append(1) or factorise(matrix))
    shared, equal = covariance(12), []
    roots = Roots(RIDGE)
    first = roots(shared)
    assert roots(shared) is first
    assert len(calls) == 1
    equal = shared.clone()
    assert roots(equal) is not first
    assert torch.equal(roots(equal), first)
    for _ in range(10):
        roots(covariance(12))
    assert len(calls) == 12
    assert torch.equal(roots(shared), first)
    assert len(calls) == 13


def test_a_ridge_that_must_grow_is_reported(tmp_path):
    indefinite = torch.diag(torch.tensor([1.0, 1.0, 1.0, -3e-4], dtype=torch.float64))
    roots = Roots(RIDGE)
    factor = roots(indefinite)
    assert roots.ridge_of(indefinite) == pytest.approx(1e-3)
    torch.testing.assert_close(factor @ factor.T, indefinite + 1e-3 * indefinite.diagonal().mean() * torch.eye(4))
    linears = {"grown": nn.Linear(4, 3), "fine": nn.Linear(4, 3)}
    found = {
        "grown": LayerStatistics(input_covariance=indefinite),
        "fine": LayerStatistics(input_covariance=covariance(4)),
    }
    events: list[Event] = []
    decompose_layers(linears, found, "whitened", RIDGE, SpectrumStore(tmp_path), events.append)
    assert [dict(event.values) for event in events] == [
        {"layer": "grown", "ridge": pytest.approx(1e-3)},
        {"layer": "fine"},
    ]


def test_too_few_tokens_for_full_rank_still_decompose():
    x = torch.randn(5, 16, dtype=torch.float64)
    weight = torch.randn(16, 16)
    roots = Roots(0.0)
    statistics = LayerStatistics(input_covariance=x.T @ x / 5)
    spectrum = decompose(weight, statistics, "whitened", 0.0, roots)
    assert spectrum.P.isfinite().all()
    assert spectrum.B.isfinite().all()
    outputs = x @ weight.double().T
    torch.testing.assert_close(x @ spectrum.B[:6].double().T @ spectrum.P[:, :6].double().T, outputs, rtol=0, atol=1e-4)


def test_a_covariance_that_is_none_is_refused():
    with pytest.raises(DataError, match="positive semi-definite"):
        Roots(RIDGE)(torch.full((3, 3), torch.nan, dtype=torch.float64))
    with pytest.raises(ValueError, match="needs"):
        decompose(torch.randn(3, 3), LayerStatistics(), "whitened", RIDGE)


def test_layers_are_stored_under_their_names(tmp_path):
    linears = {"a.q": nn.Linear(6, 4), "a.down": nn.Linear(4, 6)}
    found = {name: statistics_of(linear.out_features, linear.in_features) for name, linear in linears.items()}
    store = SpectrumStore(tmp_path)
    events: list[Event] = []
    decompose_layers(linears, found, "two-sided", RIDGE, store, events.append)
    assert [(event.stage, event.step, event.total) for event in events] == [("spectrum", 1, 2), ("spectrum", 2, 2)]
    for name, linear in linears.items():
        expected = decompose(linear.weight, found[name], "two-sided", RIDGE)
        assert all(torch.equal(part, vars(expected)[key]) for key, part in vars(store[name]).items())


@pytest.mark.parametrize("name", BASES)
def test_groups_of_layers_give_what_all_at_once_give(name, tmp_path, monkeypatch):
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **sizes))
    linears = select_linears(model, LayerSettings())
    tokens, train = torch.randint(64, (6, 512)), TrainSettings(basis=name, statistics_blocks=5)
    whole, parts = SpectrumStore(tmp_path / "whole"), SpectrumStore(tmp_path / "parts")
    decompose_model(model, linears, tokens, train, whole)
    alive: list[weakref.ref[torch.Tensor]] = []

    def collect(*arguments):
        assert not any(sums() is not None for sums in alive)
        found = collect_statistics(*arguments)
        values = [value for statistics in found.values() for value in vars(statistics).values()]
        alive.extend(weakref.ref(value) for value in values if isinstance(value, torch.Tensor))
        return found

    monkeypatch.setattr("soco_train.spectra.decompose.collect_statistics", collect)
    monkeypatch.setattr(
        "soco_train.spectra.decompose.groups", lambda linears, needs, memory: groups(linears, needs, budget=8000)
    )
    events: list[Event] = []
    decompose_model(model, linears, tokens, train, parts, events.append)
    assert list(parts) == list(whole) == sorted(linears)
    for layer in linears:
        assert all(torch.equal(part, vars(whole[layer])[key]) for key, part in vars(parts[layer]).items())
    for stage in {event.stage for event in events}:
        steps = [event for event in events if event.stage == stage]
        assert [event.step for event in steps] == list(range(1, len(steps) + 1))
        assert {event.total for event in steps} == {len(steps)}
    assert [event.values["layer"] for event in events if event.stage == "spectrum"] == list(linears)


def test_passes_are_a_matter_of_memory_and_not_of_experts(tmp_path):
    """All experts in one forward pass where there is room; a third of it takes three or four, and gives the same."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    experts = {"num_experts": 12, "num_experts_per_tok": 6, "moe_intermediate_size": 8}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(num_hidden_layers=1, vocab_size=64, head_dim=8, **sizes, **experts))
    open_sites(model)
    linears = select_linears(model, LayerSettings(exclude=("*.gate",)))
    shapes = [(linear.out_features, linear.in_features) for linear in linears.values()]
    whole = sum(sums_bytes(shape, find_basis("whitened").needs) for shape in shapes)
    tokens, passes, found = torch.randint(64, (2, 512)), list[int](), []
    for memory in (whole, whole // 3):
        store, seen = SpectrumStore(tmp_path / str(memory)), list[object]()
        with model.model.register_forward_pre_hook(lambda *call, seen=seen: seen.append(call)):
            decompose_model(model, linears, tokens, TrainSettings(statistics_memory=memory), store)
        passes.append(len(seen))
        found.append({name: store[name] for name in store})
    assert passes in ([1, 3], [1, 4])
    assert len(found[0]) > 30
    for name, spectrum in found[0].items():
        assert all(torch.equal(part, vars(found[1][name])[key]) for key, part in vars(spectrum).items())


def test_a_broken_weight_is_named(tmp_path):
    linear = nn.Linear(4, 4)
    with torch.no_grad():
        linear.weight[1, 2] = torch.nan
    with pytest.raises(DataError) as caught:
        decompose_layers({"l.q": linear}, {"l.q": LayerStatistics()}, "plain", RIDGE, SpectrumStore(tmp_path))
    assert caught.value.where == "l.q.weight"


def test_bases_are_found_by_name_with_what_they_need():
    assert find_basis("plain").needs == frozenset()
    assert find_basis("two-sided").needs == {"input_covariance", "output_curvature"}
    with pytest.raises(RecipeError, match="whitened"):
        find_basis("whitend")


def test_a_new_basis_is_one_decorated_function(monkeypatch):
    monkeypatch.setattr("soco_train.spectra.bases._BASES", {})

    @basis("doubled", needs=("input_magnitude",))
    def doubled(statistics: LayerStatistics, roots: Roots) -> Metric:
        return Metric(right=2 * statistics.input_magnitude)

    weight = torch.randn(5, 4)
    spectrum = decompose(weight, LayerStatistics(input_magnitude=torch.ones(4).double()), "doubled", RIDGE)
    torch.testing.assert_close(spectrum.sigma, 2 * torch.linalg.svdvals(weight))
