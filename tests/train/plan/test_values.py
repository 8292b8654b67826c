"""Fewer numbers a value head beside ranks: never worse by the errors, chosen where they lose less, in the budget."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from soco_export.report.draw.ranks import cells
from soco_train.errors import DataError, RecipeError
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.plan.values import ValueLosses, numbers_tried, read_value_losses
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import ValueSettings
from soco_train.store.importances import Importances, LayerImportance
from tests.support import fresh

SIZE, GROUPS, HEADS, HIDDEN = 32, 2, 4, 96
SHAPES = {"v": (GROUPS * SIZE, HIDDEN), "o": (HIDDEN, HEADS * SIZE), "up": (160, HIDDEN)}
LAYERS = {f"{block}.{name}": shape for block in range(3) for name, shape in SHAPES.items()}


def drawn(decay: float = 0.0) -> dict[str, LayerImportance]:
    rng = fresh.rng()
    found = {}
    for name, shape in LAYERS.items():
        energy = rng.exponential(size=min(shape)) * np.exp(-decay * np.arange(min(shape)))
        found[name] = LayerImportance(energy, shape, deviates=False)
    return found


def losses(layers: dict[str, LayerImportance], share: float, blocks: int = 3) -> list[ValueLosses]:
    """Return attentions that lose, with r of d numbers, `share` (1 - r / d) of all the energy of both projections."""
    found = []
    for block in range(blocks):
        energy = sum(layers[f"{block}.{name}"].importance.sum() for name in "vo")
        lost = tuple((stay, float(share * energy * (1 - stay / SIZE))) for stay in numbers_tried(SIZE))
        found.append(ValueLosses(f"{block}.v", f"{block}.o", SIZE, lost))
    return found


def planned(layers: dict[str, LayerImportance], sites: list[ValueLosses], keep: float, **changes: Any) -> RankPlan:
    settings = PlanSettings(keep_params=keep, **{"allocation": "lagrangian", **changes})
    return plan_ranks(Importances(layers, {"values": [site.record() for site in sites]}), settings)


def error_of(plan: RankPlan, layers: dict[str, LayerImportance], sites: list[ValueLosses]) -> float:
    narrowed = {name: site for site in sites if site.value in plan.values for name in (site.value, site.output)}
    ranked = [name for name in layers if name not in narrowed]
    lost = sum(np.sort(layers[name].importance)[: -plan.layers[name].rank].sum() for name in ranked)
    return float(lost + sum(dict(site.lost)[plan.values[site.value]] for site in sites if site.value in plan.values))


@pytest.mark.parametrize("keep", [0.9, 0.6, 0.3])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_the_choice_is_within_the_budget_and_never_worse_than_ranks_alone(keep: float, share: float) -> None:
    layers = drawn(decay=0.02)
    sites = losses(layers, share)
    plan, alone = planned(layers, sites, keep), planned(layers, [], keep)
    assert plan.params_after <= keep * plan.params_before
    assert error_of(plan, layers, sites) <= error_of(alone, layers, sites) * (1 + 1e-12)
    for name, layer in plan.layers.items():
        block = name[0]
        if name[2:] in ("v", "o") and f"{block}.v" in plan.values:
            stay = plan.values[f"{block}.v"]
            assert layer.dense
            assert layer.narrowed
            assert layer.params * SIZE == layer.shape[0] * layer.shape[1] * stay
            assert layer.reason == f"refine.values: {stay} of {SIZE} numbers of each value head stay"
            assert name not in plan.dense_layers
        else:
            assert not layer.narrowed


def test_what_loses_nothing_is_chosen_and_what_loses_all_is_not() -> None:
    layers = drawn()
    free = planned(layers, losses(layers, 0.0), 0.8)
    assert len(free.values) == 3
    assert "3 attentions with smaller values" in free.describe(10**6)
    dear = losses(layers, 1.0)
    assert planned(layers, dear, 0.8) == planned(layers, [], 0.8)
    mixed = [losses(layers, 0.0)[0], *dear[1:]]
    assert set(planned(layers, mixed, 0.8).values) == {"0.v"}


def test_the_plan_is_read_as_it_was_written_and_an_edited_one_is_refused() -> None:
    layers = drawn()
    plan = planned(layers, losses(layers, 0.0), 0.8)
    assert RankPlan.from_json(plan.to_json()) == plan
    stay = plan.values["0.v"]
    for values, said in (
        ({**plan.values, "9.v": stay}, "9.v is no layer with fewer"),
        ({**plan.values, "0.up": stay}, "0.up is no layer with fewer"),
        ({**plan.values, "0.v": 10**9}, "no heads of 1000000000 numbers"),
        ({"1.v": plan.values["1.v"]}, "two for each attention"),
        ({}, "two for each attention"),
    ):
        with pytest.raises(DataError, match=said):
            RankPlan.from_json(json.dumps({**json.loads(plan.to_json()), "values": values}))


def test_a_plan_that_counts_on_fewer_numbers_is_not_cut_without_them() -> None:
    plan = planned(layers := drawn(), losses(layers, 0.0), 0.8)
    assert plan.fewer_values(ValueSettings(keep="planned")).each == plan.values
    with pytest.raises(RecipeError, match="nothing asks for that"):
        plan.fewer_values(ValueSettings())


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_rules_that_weigh_components_alone_are_refused(allocation: str) -> None:
    layers = drawn()
    with pytest.raises(RecipeError, match="fewer numbers a value head are none"):
        planned(layers, losses(layers, 0.1), 0.8, allocation=allocation)


def test_numbers_tried_are_whole_steps_below_all_of_them() -> None:
    for size in range(1, 300):
        tried = list(numbers_tried(size))
        assert len(tried) < 8
        assert all(0 < stay < size and stay % 8 == 0 for stay in tried)
        assert bool(tried) == (size > 8)


@pytest.mark.parametrize(
    "records",
    [
        7, "v", [1], [["0.v", "0.o", 32]], [["0.v", "0.o", 32, []]], [["0.v", "0.o", 32, [[8, "nan"]]]],
        [["0.v", "0.o", 32, [[8, None]]]], [["0.v", "9.o", 32, [[8, 1.0]]]], [["0.v", "0.v", 32, [[8, 1.0]]]],
        [["0.v", "0.o", 32, [[16, 1.0], [8, 2.0]]]], [["0.v", "0.o", 8, [[8, 1.0]]]],
        [["0.v", "0.o", 10**30, [[True, 1.0]]]], [[["0.v"], "0.o", 32, [[8, 1.0]]]],
        [["0.v", "0.o", 32, [[8, 1.0]]], ["0.v", "1.o", 32, [[8, 1.0]]]],
        [["0.v", "0.o", 32, [[8, -1e308]]]], [["0.v", "0.o", 24, [[8, 1.0]]]], [["0.up", "0.o", 10**9, [[8, 1.0]]]],
    ],
)  # fmt: skip
def test_losses_that_are_none_are_refused(records: Any) -> None:
    with pytest.raises(DataError, match="no losses of value heads"):
        read_value_losses(records, LAYERS)


def test_what_an_attention_with_fewer_numbers_keeps_is_drawn() -> None:
    plan = planned(layers := drawn(), losses(layers, 0.0), 0.8)
    for (projection, block), (share, dense) in cells(plan.layers).items():
        assert share == (plan.values[f"{block}.v"] / SIZE if projection in "vo" else 1.0)
        assert dense == (projection == "up")
