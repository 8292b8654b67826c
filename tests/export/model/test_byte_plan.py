"""Bytes as the budget: what the plan counts is what the file has, and what it chooses is next to the best there is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_export.onnx.source import StoredForm
from soco_export.onnx.write.graph import DataFile, Graph
from soco_train.errors import RecipeError
from soco_train.forms.registry import state_of
from soco_train.plan.bytes import Choice, Menu, Packing, Tables, bytes_of, choose_storage, errors_of, menus_of, pages
from soco_train.settings.rounding import BITS, TYPES, WeightType
from soco_train.store.damage import DENSE, Damage, LayerDamage

SIZES = st.integers(2, 90)


class OneLayer:
    """A checkpoint of one layer of random numbers."""

    def __init__(self, m: int, n: int, form: StoredForm) -> None:
        self._form = form
        blanks = state_of(form.kind, m, n, form.rank, False) if form.rank else {"weight": torch.empty(m, n)}
        self._parts = {
            f"layer.{name}": torch.randperm(m).numpy() if name == "order" else torch.randn(blank.shape).numpy()
            for name, blank in blanks.items()
        }
        self.shapes = {name: part.shape for name, part in self._parts.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._parts

    def form(self, name: str) -> StoredForm:
        return self._form

    def read(self, name: str) -> np.ndarray:
        return self._parts[name]

    def levels(self, name: str) -> None:
        return None


@given(
    st.tuples(SIZES, SIZES),
    st.floats(0, 1),
    st.sampled_from(["dense", "stacked", "pivoted"]),
    st.sampled_from(TYPES),
    st.tuples(st.sampled_from([16, 32, 128]), st.booleans()),
)
def test_a_layer_takes_the_bytes_that_are_counted(
    tmp_path_factory: pytest.TempPathFactory,
    shape: tuple[int, int],
    share: float,
    form: str,
    weights: WeightType,
    blocks: tuple[Any, bool],
) -> None:
    (m, n), (block, symmetric) = shape, blocks
    rank = 0 if form == DENSE else 1 + int(share * (min(shape) - 2))
    settings = ExportSettings(weights=weights, quantize=QuantizeSettings(block=block, symmetric=symmetric))
    file = DataFile(tmp_path_factory.mktemp("file") / "data")
    graph = Graph(file, ir.DataType.FLOAT)
    source = OneLayer(m, n, StoredForm(form, rank))
    Linears(graph, source, settings)(graph.input("x", ir.DataType.FLOAT, [1, n]), "layer")
    file.write("behind", np.zeros(1, np.uint8), ir.DataType.UINT8)  # where the next tensor would begin
    file.close()
    packing = Packing(4, symmetric)
    counted = packing.layer(Choice(form, rank or min(shape), weights, block), shape)
    if form == "pivoted" and np.array_equal(source.read("layer.order"), np.arange(m)):
        counted -= pages(8 * m)
    assert file.path.stat().st_size - 1 == counted


def menus(draw: st.DrawFn) -> dict[str, Menu]:
    offer = st.tuples(st.integers(1, 40), st.floats(0, 1))
    layers = draw(st.lists(st.lists(offer, min_size=1, max_size=6), min_size=1, max_size=4))
    return {
        f"layer{i}": Menu.of([(Choice(DENSE, rank, "same"), size, error) for rank, (size, error) in enumerate(layer)])
        for i, layer in enumerate(layers)
    }


@given(st.composite(menus)(), st.integers(1, 160))
def test_the_choice_is_next_to_the_best_of_all(found: dict[str, Menu], budget: int) -> None:
    everything = [
        dict(zip(found, chosen, strict=True)) for chosen in itertools.product(*(m.choices for m in found.values()))
    ]
    within = [choices for choices in everything if bytes_of(found, choices) <= budget]
    chosen = choose_storage(found, budget)
    if not within:
        assert all(chosen[name] == menu.choices[0] for name, menu in found.items())
        return
    assert bytes_of(found, chosen) <= budget
    best, step = (
        min(errors_of(found, choices) for choices in within),
        max(float(np.ptp(m.errors)) for m in found.values()),
    )
    assert errors_of(found, chosen) <= best + step + 1e-12  # at most the one layer that the price leaves half bought
    assert errors_of(found, choose_storage(found, budget + 40)) <= errors_of(found, chosen) + step + 1e-12


def layer(error: float, shape: tuple[int, int] = (64, 64), blocks: tuple[int, ...] = (32,)) -> LayerDamage:
    """Return a dense layer whose error grows sixteenfold for half the bits, beginning at `error` in int8."""
    steps = {"same": 0.0, "int8": error, "int4": 16 * error, "int2": 256 * error}
    kinds = [(kind, block) for kind in TYPES for block in (blocks if kind in BITS else (0,))]
    return LayerDamage(shape, {(DENSE, kind, block): torch.tensor([steps[kind]]).double() for kind, block in kinds})


def test_a_layer_that_does_not_mind_gets_fewer_bits() -> None:
    table = LayerDamage((64, 64), {(DENSE, "int8", 32): torch.zeros(1).double()})
    shape = (256, 256)
    damage = Damage({"calm": layer(1e-6, shape), "keen": layer(1e-3, shape), "table": table})
    found = menus_of(damage, Packing(), 1, Tables("table", "head", tied=True))
    sizes = {kind: Packing().matrix(*shape, kind, 32) for kind in TYPES}
    chosen = choose_storage(found, sizes["int8"] + sizes["int2"] + Packing().table(64, 64, "int8", 32))
    assert (chosen["calm"].weights, chosen["keen"].weights) == ("int2", "int8")


def test_a_step_as_large_as_half_the_budget_is_not_left_to_the_price() -> None:
    def step(size: int, error: float) -> Menu:
        return Menu.of([(Choice(DENSE, 1, "int4"), size, error), (Choice(DENSE, 1, "int8"), 2 * size, 0.0)])

    found = {"table": step(200, 0.02)}
    found |= {f"keen{i}": step(10, 0.003) for i in range(5)} | {f"calm{i}": step(10, 0.0002) for i in range(15)}
    # by price the keen layers come first, and the table no longer fits: 0.02 is left instead of 0.018
    chosen = choose_storage(found, 600)
    assert chosen["table"].weights == "int8"
    assert errors_of(found, chosen) == pytest.approx(0.018)


def test_a_table_that_a_tied_head_shares_is_paid_once() -> None:
    tied, own = Tables("table", "head", tied=True), Tables("table", "head", tied=False)
    damage = Damage({"table": layer(1e-3), "head": layer(1e-3)})
    assert set(menus_of(damage, Packing(), 1, tied)) == {"table"}
    assert set(menus_of(damage, Packing(), 1, own)) == {"table", "head"}
    # blocks that do not divide the width need a copy of their own
    damage = Damage({name: layer(1e-3, blocks=(48,)) for name in ("table", "head")})
    assert set(menus_of(damage, Packing(), 1, tied)) == {"table", "head"}
    # where some divide it, the others are not offered
    damage = Damage({name: layer(1e-3, blocks=(48, 64)) for name in ("table", "head")})
    found = menus_of(damage, Packing(), 1, tied)
    assert set(found) == {"table"}
    assert {choice.block for choice in found["table"].choices} == {0, 64}


def test_damage_survives_its_file(tmp_path: Path) -> None:
    damage = Damage({"a.b": LayerDamage((3, 4), {("stacked", "int4", 64): torch.rand(4).double()}, biased=True)})
    damage.save(tmp_path / "damage.safetensors")
    found = Damage.load(tmp_path / "damage.safetensors").layers["a.b"]
    assert (found.shape, found.biased) == ((3, 4), True)
    assert torch.equal(found.curves["stacked", "int4", 64], damage.layers["a.b"].curves["stacked", "int4", 64])


def test_types_of_single_layers_go_before_the_others() -> None:
    settings = ExportSettings(
        weights="int4", each={"*.down": "int8"}, quantize=QuantizeSettings(keep=("*.up",), blocks={"*.gate": 16})
    )
    planned = settings.planned({"0.up": "int2", "0.down": "same", "embed": "int4"}, {"0.up": 64, "0.gate": 128})
    assert [planned.weights_of(name) for name in ("0.down", "0.up", "0.gate")] == ["int8", "int2", "int4"]
    assert (settings.table_of("embed"), planned.table_of("embed")) == ("int8", "int4")
    assert [planned.quantize.block_of(name) for name in ("0.down", "0.up", "0.gate")] == [32, 64, 16]
    with pytest.raises(RecipeError, match="token table"):
        ExportSettings(each={"embed": "int2"}).table_of("embed")
