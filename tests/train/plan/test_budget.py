"""The budget, by property and against brute force over every combination of ranks."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soco_train.errors import DataError, RecipeError
from soco_train.plan.allocation import layer_cost
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.settings.plan import PlanSettings
from soco_train.store.scores import LayerScores, Scores

STORAGES = st.sampled_from(["stacked", "pivoted"])
EXACT = st.sampled_from(["global", "lagrangian"])
ALLOCATIONS = st.sampled_from(["global", "lagrangian", "uniform"])


def make_scores(importances: list[list[float]], shapes: list[tuple[int, int]], deviation: bool = False) -> Scores:
    return Scores(
        {
            f"layer{i}": LayerScores(
                importance=torch.tensor(values, dtype=torch.float64),
                scale=torch.ones(len(values)),
                deviation=torch.zeros(shape[0]) if deviation else None,
                shape=shape,
            )
            for i, (values, shape) in enumerate(zip(importances, shapes, strict=True))
        }
    )


@st.composite
def scores(draw: st.DrawFn, largest: int = 12, layers: int = 5) -> Scores:
    shapes = draw(st.lists(st.tuples(st.integers(2, largest), st.integers(2, largest)), min_size=1, max_size=layers))
    # Few distinct values, so that ties are common.
    number = st.integers(0, 6).map(lambda i: i / 4) | st.floats(0, 2)
    importances = [draw(st.lists(number, min_size=min(shape), max_size=min(shape))) for shape in shapes]
    return make_scores(importances, shapes, draw(st.booleans()))


def plan_or_none(found: Scores, wanted: PlanSettings) -> RankPlan | None:
    """None where even the smallest rank everywhere is too much: then the advice must work."""
    try:
        return plan_ranks(found, wanted)
    except RecipeError as error:
        smallest = float(error.fix.rsplit(" ", 1)[1])
        assert smallest > wanted.keep_params
        assert plan_ranks(found, wanted.model_copy(update={"keep_params": smallest}))
        return None


def ladder(layer: LayerScores, storage: str, multiple: int) -> list[tuple[int, int]]:
    """All (rank, cost) of one layer, by the definition."""
    m, n = layer.shape
    extra = 0 if layer.deviation is None else m
    ranks = range(multiple, min(m, n), multiple)
    low = [(r, (r * (m + n - r) if storage == "pivoted" else r * (m + n)) + extra) for r in ranks]
    return [(r, cost) for r, cost in low if cost < m * n] + [(min(m, n), m * n)]


@given(scores(), st.floats(0.05, 1), STORAGES, ALLOCATIONS, st.sampled_from([1, 2, 3]))
def test_never_exceeds_the_budget_and_costs_what_it_says(found, keep, storage, allocation, multiple):
    wanted = PlanSettings(keep_params=keep, storage=storage, allocation=allocation, multiple=multiple)
    plan = plan_or_none(found, wanted)
    if plan is None:
        return
    assert plan.params_after <= keep * plan.params_before
    assert list(plan.layers) == list(found.layers)
    for name, layer in plan.layers.items():
        assert (layer.rank, layer.params) in ladder(found.layers[name], storage, multiple)
        assert layer.dense == (layer.params == layer.shape[0] * layer.shape[1])
        assert layer.dense == bool(layer.reason)
        assert layer.dense or layer.rank % multiple == 0


@given(scores(), st.floats(0.05, 1), STORAGES, EXACT, st.sampled_from([1, 2, 3]))
def test_what_remains_buys_no_further_step(found, keep, storage, allocation, multiple):
    wanted = PlanSettings(keep_params=keep, storage=storage, allocation=allocation, multiple=multiple)
    plan = plan_or_none(found, wanted)
    if plan is None or not any(not layer.dense for layer in plan.layers.values()):
        return
    left = keep * plan.params_before - plan.params_after
    for name, layer in plan.layers.items():
        dearer = [cost for _, cost in ladder(found.layers[name], storage, multiple) if cost > layer.params]
        assert not dearer or left < min(dearer) - layer.params


@given(scores(), st.floats(0.05, 1), st.floats(0.05, 1), STORAGES, ALLOCATIONS)
def test_a_larger_budget_never_keeps_less(found, one, other, storage, allocation):
    small, large = sorted([one, other])
    wanted = PlanSettings(keep_params=small, storage=storage, allocation=allocation)
    plan = plan_or_none(found, wanted)
    if plan is not None:
        assert plan.params_after <= plan_ranks(found, wanted.model_copy(update={"keep_params": large})).params_after


@given(scores(), STORAGES, ALLOCATIONS)
def test_keeping_everything_leaves_everything_dense(found, storage, allocation):
    plan = plan_ranks(found, PlanSettings(keep_params=1, storage=storage, allocation=allocation))
    assert all(layer.dense for layer in plan.layers.values())
    assert plan.params_after == plan.params_before
    assert plan.ratio == 1


def one_by_one(found: Scores, wanted: PlanSettings) -> dict[str, tuple[int, int]]:
    """The plain algorithm: walk all components in order, take each unless its layer has stopped or cannot pay."""
    multiple = wanted.multiple
    ladders = {name: ladder(layer, wanted.storage, multiple) for name, layer in found.layers.items()}

    def size(name: str, count: int) -> tuple[int, int]:
        rank = max(count, multiple) // multiple * multiple
        dense = ladders[name][-1]
        if count == dense[0]:
            return dense
        return next((rung for rung in ladders[name][:-1] if rung[0] == rank), dense)

    everyone = sorted(
        (-float(value), position, index, name)
        for position, (name, layer) in enumerate(found.layers.items())
        for index, value in enumerate(layer.importance)
    )
    counts, stopped = dict.fromkeys(found.layers, 0), set()
    budget = Fraction(str(wanted.keep_params)) * sum(dense[-1][1] for dense in ladders.values())
    for *_, name in everyone:
        total = sum(size(other, counts[other] + (other == name))[1] for other in counts)
        if name not in stopped and total <= budget:
            counts[name] += 1
        else:
            stopped.add(name)
    return {name: size(name, count) for name, count in counts.items()}


@given(scores(), st.floats(0.2, 1), STORAGES, st.sampled_from([1, 2, 3]))
def test_global_cut_equals_adding_components_one_by_one(found, keep, storage, multiple):
    wanted = PlanSettings(keep_params=keep, storage=storage, multiple=multiple)
    plan = plan_or_none(found, wanted)
    if plan is not None:
        assert {name: (layer.rank, layer.params) for name, layer in plan.layers.items()} == one_by_one(found, wanted)


@settings(max_examples=60)
@given(scores(largest=6, layers=3), st.floats(0.2, 1), STORAGES)
def test_lagrangian_is_within_one_move_of_the_best_combination(found, keep, storage):
    """Brute force: at the price where the budget ends, no combination is better by more than one layer's importance."""
    wanted = PlanSettings(keep_params=keep, storage=storage, allocation="lagrangian")
    plan = plan_or_none(found, wanted)
    if plan is None:
        return

    def value(name: str, rank: int) -> float:
        return float(found.layers[name].importance.sort(descending=True).values[:rank].sum())

    choices = [
        [(value(name, rank), cost) for rank, cost in ladder(layer, storage, 1)] for name, layer in found.layers.items()
    ]
    budget = keep * plan.params_before
    best = max(
        sum(gain for gain, _ in pick) for pick in itertools.product(*choices) if sum(c for _, c in pick) <= budget
    )
    reached = sum(value(name, layer.rank) for name, layer in plan.layers.items())
    assert reached <= best + 1e-9
    assert reached >= best - max(gains[-1][0] - gains[0][0] for gains in choices) - 1e-9


def test_lagrangian_matches_brute_force_where_segments_are_single_steps():
    """Stacked and far from the dense rung, value is concave in cost: filling in order of density is optimal."""
    torch.manual_seed(0)
    shapes = [(40, 40), (40, 40), (40, 40)]
    values = [(torch.rand(40, dtype=torch.float64) + 0.1).tolist() for _ in shapes]
    found = make_scores(values, shapes)
    plan = plan_ranks(found, PlanSettings(keep_params=0.3, allocation="lagrangian"))
    everything = torch.tensor(values).flatten().sort(descending=True).values
    components = plan.params_after // 80
    reached = sum(
        torch.tensor(one).sort(descending=True).values[: layer.rank].sum()
        for one, layer in zip(values, plan.layers.values(), strict=True)
    )
    assert components == 18  # ⌊0.3 · 4800 / 80⌋
    assert reached == pytest.approx(float(everything[:components].sum()), rel=1e-6)


@given(st.integers(0, 2**32), st.floats(0.2, 1), STORAGES)
def test_lagrangian_equals_buying_the_best_move_that_fits_again_and_again(seed, keep, storage):
    """The plain algorithm, without a price: any layer may jump to any of its larger sizes, the densest gain first."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(24, 20), (12, 30), (16, 16)]
    found = make_scores(
        [torch.rand(min(shape), generator=random, dtype=torch.float64).pow(3).tolist() for shape in shapes], shapes
    )
    wanted = PlanSettings(keep_params=keep, storage=storage, allocation="lagrangian")
    plan = plan_or_none(found, wanted)
    if plan is None:
        return
    ladders = {name: ladder(layer, storage, 1) for name, layer in found.layers.items()}
    gains = {name: layer.importance.sort(descending=True).values.cumsum(0) for name, layer in found.layers.items()}
    sizes = {name: rungs[0] for name, rungs in ladders.items()}
    while True:
        left = keep * plan.params_before - sum(cost for _, cost in sizes.values())
        moves = [
            (float(gains[name][rank - 1] - gains[name][sizes[name][0] - 1]) / (cost - sizes[name][1]), name, rank, cost)
            for name, rungs in ladders.items()
            for rank, cost in rungs
            if 0 < cost - sizes[name][1] <= left
        ]
        if not moves:
            break
        _, name, rank, cost = max(moves)
        sizes[name] = (rank, cost)
    assert {name: (layer.rank, layer.params) for name, layer in plan.layers.items()} == sizes


def test_lagrangian_sees_that_late_pivoted_ranks_are_cheap():
    """One component at a time, the flat layer never starts; all of it at once is the better buy."""
    flat, steep = [1.0] * 16, [1.5] * 4 + [0.01] * 12
    found = make_scores([flat, steep], [(16, 16), (16, 16)])
    by_component = plan_ranks(found, PlanSettings(keep_params=0.7, storage="pivoted"))
    by_price = plan_ranks(found, PlanSettings(keep_params=0.7, storage="pivoted", allocation="lagrangian"))

    def reached(plan: RankPlan) -> float:
        return sum(flat[: plan.layers["layer0"].rank]) + sum(steep[: plan.layers["layer1"].rank])

    assert reached(by_price) > reached(by_component)
    assert by_price.layers["layer0"].dense


def test_ties_go_to_the_first_layer_and_the_lowest_index():
    found = make_scores([[1.0] * 8, [1.0] * 8], [(8, 8), (8, 8)])
    plan = plan_ranks(found, PlanSettings(keep_params=0.5))
    assert [layer.rank for layer in plan.layers.values()] == [3, 1]
    assert kept(torch.tensor([0.5, 1.0, 0.5, 0.5, 2.0]), 3).tolist() == [0, 1, 4]


def test_many_ties_are_as_orderly_as_few():
    """A sort that is stable only for short lists would scatter the ranks."""
    found = make_scores([torch.randint(3, (200,)).tolist() for _ in range(3)], [(200, 200)] * 3)
    for keep in (0.3, 0.5, 0.7):
        wanted = PlanSettings(keep_params=keep, storage="pivoted")
        plan = plan_ranks(found, wanted)
        assert {name: (layer.rank, layer.params) for name, layer in plan.layers.items()} == one_by_one(found, wanted)
    assert kept(torch.ones(5000), 77).tolist() == list(range(77))


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.data())
def test_kept_takes_the_most_important(values, data):
    importance = torch.tensor(values, dtype=torch.float32)
    rank = data.draw(st.integers(1, len(values)))
    chosen = kept(importance, rank)
    assert chosen.dtype == torch.int64
    assert chosen.tolist() == sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:rank])


@given(scores(), STORAGES, EXACT)
def test_the_same_scores_give_the_same_plan(found, storage, allocation):
    wanted = PlanSettings(keep_params=0.9, storage=storage, allocation=allocation)
    first = plan_or_none(found, wanted)
    if first is not None:
        assert first == plan_ranks(found, wanted)
        assert first.to_json() == plan_ranks(found, wanted).to_json()
        assert RankPlan.from_json(first.to_json()) == first


@pytest.mark.parametrize(("keep", "ranks"), [(0.8, (230, 115, 335)), (0.6, (172, 86, 251))])
def test_uniform_stacked_is_the_published_svd_llm_rule(keep, ranks):
    shapes = [(576, 576), (192, 576), (1536, 576), (576, 1536)]
    found = make_scores([[1.0] * min(shape) for shape in shapes], shapes)
    plan = plan_ranks(found, PlanSettings(keep_params=keep, allocation="uniform"))
    assert [layer.rank for layer in plan.layers.values()] == [*ranks, ranks[-1]]


def test_uniform_pivoted_is_the_published_pifa_size():
    found = make_scores([[1.0] * 576], [(1536, 576)])
    plan = plan_ranks(found, PlanSettings(keep_params=0.6, allocation="uniform", storage="pivoted"))
    layer = plan.layers["layer0"]
    assert (layer.rank, layer.params) == (291, 529_911)


def test_cost_of_a_rank():
    assert layer_cost(10, 30, 20, "stacked") == 500
    assert layer_cost(10, 30, 20, "pivoted") == 400
    assert layer_cost(20, 30, 20, "pivoted") == 600


def test_a_deviation_costs_m_unless_the_caller_knows_better():
    found = make_scores([[1.0] + [0.0] * 19], [(30, 20)], deviation=True)
    wanted = PlanSettings(keep_params=0.1334)
    assert plan_ranks(found, wanted).layers["layer0"].params == 80
    assert plan_ranks(found, PlanSettings(keep_params=0.0834), {"layer0": 0}).layers["layer0"].params == 50
    with pytest.raises(RecipeError):
        plan_ranks(found, PlanSettings(keep_params=0.0834))


def test_reasons_and_description_name_what_stays_dense():
    found = make_scores([[9.0] * 15 + [0.1] * 5, [1.0] * 20], [(20, 20), (20, 20)])
    plan = plan_ranks(found, PlanSettings(keep_params=0.7))
    assert plan.dense_layers == {"layer0": "cheaper dense than rank 10 of 20"}
    assert plan.describe(134_500_000) == (
        "134.5M → 134.5M (selected 800 → 560) · 1 of 2 layers left dense · stored stacked"
    )
    whole = plan_ranks(found, PlanSettings(keep_params=1, storage="pivoted"))
    assert set(whole.dense_layers.values()) == {"all 20 components survive"}
    coarse = plan_ranks(found, PlanSettings(keep_params=1, multiple=64))
    assert set(coarse.dense_layers.values()) == {"no allowed rank is cheaper than dense"}


def test_an_impossible_budget_says_what_is_possible():
    found = make_scores([[1.0] * 20] * 2, [(20, 20)] * 2)
    with pytest.raises(RecipeError, match=r"smallest possible keep_params here is 0\.1000"):
        plan_ranks(found, PlanSettings(keep_params=0.09))
    assert plan_ranks(found, PlanSettings(keep_params=0.1)).params_after == 80


@pytest.mark.parametrize("values", [[1.0, float("nan")], [1.0, float("inf")], [1.0], [1.0, 2.0, 3.0]])
def test_importances_must_be_finite_and_complete(values):
    with pytest.raises(DataError) as caught:
        plan_ranks(make_scores([values], [(2, 5)]), PlanSettings())
    assert caught.value.where == "layer0"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"layers": {"a": {"shape": [1]}}}', '{"layers": 3}'])
def test_a_broken_plan_file_is_a_data_error(text):
    with pytest.raises(DataError, match="rank plan"):
        RankPlan.from_json(text)
