"""The two factored modules against plain float64 products, on fresh random input each time."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from soco_export.checkpoint.layers import (
    apply_factors,
    count_parameters,
    factored_layers,
    merge_dense,
    stored_factors,
)
from soco_train.errors import DataError
from soco_train.forms.base import FactoredLinear
from soco_train.forms.pivoted import PivotedFactors, PivotedLinear
from soco_train.forms.registry import LayerFactors, from_factors
from soco_train.forms.stacked import LowRankLinear, StackedFactors
from soco_train.store import factors as factors_file
from soco_train.store.factors import Factors


def random_factors(kind: str, m: int, n: int, r: int, bias: bool, dtype: torch.dtype = torch.float64) -> LayerFactors:
    b = torch.randn(m, dtype=dtype) if bias else None
    if kind == "stacked":
        return StackedFactors(torch.randn(m, r, dtype=dtype), torch.randn(r, n, dtype=dtype), b)
    return PivotedFactors(torch.randn(r, n, dtype=dtype), torch.randn(m - r, r, dtype=dtype), torch.randperm(m), b)


def plain_weight(factors: LayerFactors) -> torch.Tensor:
    """The dense weight, row by row from the definition."""
    if isinstance(factors, StackedFactors):
        return torch.einsum("mr,rn->mn", factors.up.double(), factors.down.double())
    pivot = factors.pivot.double()
    rows = [*pivot, *(coefficients @ pivot for coefficients in factors.mix.double())]
    weight = torch.full((len(rows), pivot.shape[1]), torch.nan, dtype=torch.float64)
    for entry, row in zip(factors.order.tolist(), rows, strict=True):
        weight[entry] = row
    return weight


sizes = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12)).map(
    lambda s: (s[0], s[1], min(s[0], s[1], s[2]))
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["stacked", "pivoted"]), sizes, st.booleans())
def test_modules_are_the_map_that_their_factors_define(kind: str, size: tuple[int, int, int], bias: bool) -> None:
    m, n, r = size
    factors = random_factors(kind, m, n, r, bias)
    module = from_factors(factors)
    x = torch.randn(3, 2, n, dtype=torch.float64)
    expected = x @ plain_weight(factors).T + (factors.bias if factors.bias is not None else 0)
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(module.to_linear()(x), expected)
    assert (module.out_features, module.in_features, module.rank) == (m, n, r)
    bias_count = m if bias else 0
    assert count_parameters(module) == bias_count + (r * (m + n) if kind == "stacked" else r * (m + n - r))


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_state(kind: str, dtype: torch.dtype) -> None:
    factors = random_factors(kind, 7, 5, 3, True, torch.float32)
    module = from_factors(factors, dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    assert module.weight.shape == (3, 5)
    # A cast of the whole model must leave `order` an integer, and a fresh module must take the state.
    module.to(torch.bfloat16).to(dtype)
    twin = type(module)(5, 7, 3, True, dtype=dtype)
    twin.load_state_dict(module.state_dict())
    x = torch.randn(4, 5, dtype=dtype)
    assert torch.equal(module(x), twin(x))
    if isinstance(module, PivotedLinear):
        assert module.order.dtype == torch.int64
        assert torch.equal(module.order, factors.order)


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_gradients_are_those_of_the_dense_product(kind: str) -> None:
    module = from_factors(random_factors(kind, 6, 5, 3, True))
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, *module.parameters()))


def test_the_factors_are_copied() -> None:
    factors = random_factors("stacked", 4, 4, 2, False)
    module = from_factors(factors)
    factors.up.zero_()
    assert module(torch.randn(4, dtype=torch.float64)).abs().sum() > 0


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5, bias=False)).double()


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_apply_then_merge_is_the_same_function(kind: str) -> None:
    model = network().eval()
    original = copy.deepcopy(model)
    factors = Factors({"0": random_factors(kind, 8, 6, 2, True), "2": random_factors(kind, 5, 8, 3, False)})
    apply_factors(model, factors)
    assert list(factored_layers(model)) == ["0", "2"]
    assert not model[0].training
    x = torch.randn(9, 6, dtype=torch.float64)
    low_rank = model(x)
    assert not torch.allclose(low_rank, original(x))
    merge_dense(model)
    assert [type(module) for module in model] == [nn.Linear, nn.ReLU, nn.Linear]
    torch.testing.assert_close(model(x), low_rank)
    torch.testing.assert_close(model[2].weight, plain_weight(factors.layers["2"]), check_dtype=False)


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_full_rank_becomes_dense(kind: str) -> None:
    """A factor with m rows would have the dense weight's shape, and load silently elsewhere."""
    model = network()
    factors = Factors({"2": random_factors(kind, 5, 8, 5, False)})
    apply_factors(model, factors)
    assert type(model[2]) is nn.Linear
    torch.testing.assert_close(model[2].weight, plain_weight(factors.layers["2"]))


@pytest.mark.parametrize("kind", ["stacked", "pivoted"])
def test_factors_of_a_file_are_those_in_memory_and_rounded_last(kind: str, tmp_path: Path) -> None:
    layers = {"0": random_factors(kind, 8, 6, 2, True), "2": random_factors(kind, 5, 8, 5, False)}
    Factors(layers).save(tmp_path / "factors.safetensors")
    model, expected = network(), network()
    stored = stored_factors(tmp_path / "factors.safetensors")
    assert (list(stored), len(stored)) == (["0", "2"], 2)
    apply_factors(model, stored, torch.bfloat16)
    apply_factors(expected, Factors(layers))
    expected.to(torch.bfloat16)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name
        assert tensor.dtype == expected.state_dict()[name].dtype


def test_each_layer_of_a_file_is_read_once_whatever_their_number(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "factors.safetensors"
    Factors({str(i): random_factors("stacked", 5, 8, 2, True) for i in range(10)}).save(path)
    stored = stored_factors(path)
    read = []
    make = factors_file._layer_factors
    monkeypatch.setattr(
        factors_file, "_layer_factors", lambda kind, name, _: (read.append(name), make(kind, name, _))[1]
    )
    assert [name for name, _ in stored.items()] == read == [str(i) for i in range(10)]


@pytest.mark.parametrize("name", ["2", "1", "7"])
def test_foreign_factors_are_refused_and_nothing_changes(name: str) -> None:
    model = network()
    before = [type(module) for module in model]
    factors = Factors({"0": random_factors("stacked", 8, 6, 2, True), name: random_factors("stacked", 5, 9, 2, False)})
    with pytest.raises(DataError, match=rf"factors of {name} make a Linear of 5 × 9"):
        apply_factors(model, factors)
    assert [type(module) for module in model] == before


def test_a_tied_parameter_counts_once() -> None:
    model = nn.ModuleList([nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)])
    model[1].weight = model[0].weight
    assert count_parameters(model) == 40


def test_construction_on_meta_allocates_nothing() -> None:
    for kind in (LowRankLinear, PivotedLinear):
        module: FactoredLinear = kind(6, 5, 2, True, device="meta")
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        assert repr(module).startswith(f"{kind.__name__}(\n  in_features=6, out_features=5, rank=2")


def test_what_a_rank_costs_is_known_before_the_forms_are() -> None:
    code = "from soco_train.forms.costs import COSTS; known = dict(COSTS); "
    code += "import sys; assert 'torch' not in sys.modules; import soco_train.forms.registry; assert COSTS == known"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
