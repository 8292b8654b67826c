"""The measured plan, decided on synthetic times; and one small real measurement."""

from __future__ import annotations

import itertools
import json
import os
from contextlib import suppress
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from soco_export.bench.device import Device
from soco_export.bench.layer_times import Conditions, FormTimes, Profile, at_rank, dense_from, liked_multiple, limits
from soco_export.bench.layer_timing import (
    CACHE_BYTES,
    SHARES,
    CopiedLayer,
    _copies,
    measure_profile,
    rank_grid,
)
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_export.recipe.load import load_recipe
from soco_export.run.plans.measured_plan import check_profile, plan_for
from soco_train.errors import DataError, MachineError, RecipeError
from soco_train.plan.allocation import layer_cost
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.plan import PlanSettings
from soco_train.store.scores import LayerScores, Scores
from tests.support.cli import soco

CONDITIONS = Conditions("cpu", "CPUExecutionProvider", 2, "1.32", "float32", "same", "", False, (1, 512))
STORAGES = st.sampled_from(["stacked", "pivoted"])


@st.composite
def form_times(draw: st.DrawFn, shape: tuple[int, int]) -> FormTimes:
    """Any times at all, in any order: measurements need not be sensible."""
    ranks = sorted(draw(st.sets(st.integers(1, min(shape)), min_size=1, max_size=5)))
    time = st.floats(0.5, 50)
    times = tuple((draw(time), draw(time)) for _ in ranks)
    return FormTimes((draw(time), draw(time)), tuple(ranks), times)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scores, Profile, PlanSettings]:
    shapes = draw(st.lists(st.tuples(st.integers(2, 14), st.integers(2, 14)), min_size=1, max_size=5))
    layers = {}
    for index, shape in enumerate(shapes):
        values = draw(st.lists(st.floats(0, 2), min_size=min(shape), max_size=min(shape)))
        layers[f"layer{index}"] = LayerScores(torch.tensor(values), torch.ones(len(values)), None, shape)
    storage = draw(STORAGES)
    profile = Profile(CONDITIONS, 1, {shape: {storage: draw(form_times(shape))} for shape in set(shapes)})
    allocation = draw(st.sampled_from(["global", "lagrangian"]))
    multiple, keep = draw(st.sampled_from([1, 2])), draw(st.floats(0.1, 1))
    return (
        Scores(layers),
        profile,
        PlanSettings(keep_params=keep, storage=storage, allocation=allocation, multiple=multiple),
    )


@settings(max_examples=100)
@given(cases())
def test_every_pruned_layer_is_faster_and_what_is_left_buys_no_further_step(case):
    scores, profile, wanted = case
    shapes = {name: layer.shape for name, layer in scores.layers.items()}
    ends = limits(profile, shapes, wanted.storage, wanted.multiple)
    try:
        plan = plan_ranks(scores, wanted, limits=ends)
    except RecipeError as error:
        smallest = float(error.fix.rsplit(" ", 1)[1])
        assert smallest > wanted.keep_params
        plan = plan_ranks(scores, wanted.model_copy(update={"keep_params": smallest}), limits=ends)
        wanted = wanted.model_copy(update={"keep_params": smallest})
    left = Fraction(str(wanted.keep_params)) * plan.params_before - plan.params_after
    assert left >= 0
    for name, layer in plan.layers.items():
        times = profile.layers[layer.shape][wanted.storage]
        if not layer.dense:
            assert (at_rank(times, layer.rank) < times.dense).all()
            assert layer.rank % wanted.multiple == 0
        m, n = layer.shape
        rungs = [r for r in range(wanted.multiple, min(m, n), wanted.multiple) if r < ends[name].rank] if name in ends \
            else list(range(wanted.multiple, min(m, n), wanted.multiple))  # fmt: skip
        sizes = [layer_cost(r, m, n, wanted.storage) for r in rungs]
        dearer = [size for size in [*(s for s in sizes if s < m * n), m * n] if size > layer.params]
        assert not dearer or left < min(dearer) - layer.params


@settings(max_examples=30)
@given(cases())
def test_times_that_never_lose_change_nothing(case):
    scores, _, wanted = case
    fast = {
        layer.shape: {wanted.storage: FormTimes((9.0, 9.0), (1,), ((1.0, 1.0),))} for layer in scores.layers.values()
    }
    shapes = {name: layer.shape for name, layer in scores.layers.items()}
    ends = limits(Profile(CONDITIONS, 1, fast), shapes, wanted.storage, wanted.multiple)
    assert ends == {}


def test_the_reason_says_what_was_measured():
    times = FormTimes((36.0, 900.0), (100, 200), ((20.0, 500.0), (41.2, 800.0)))
    limit = dense_from(times, (1, 512), range(50, 300, 50))
    assert limit is not None
    assert (limit.rank, limit.reason) == (200, "measured 41 µs at rank 200 against 36 µs dense (1 token)")
    slow_prefill = FormTimes((36.0, 700.0), (100, 200), ((20.0, 500.0), (30.0, 800.0)))
    limit = dense_from(slow_prefill, (1, 512), range(50, 300, 50))
    assert limit is not None
    assert limit.reason == "measured 800 µs at rank 200 against 700 µs dense (512 tokens)"
    layer = LayerScores(torch.arange(300.0, 0, -1), torch.ones(300), None, (900, 300))
    plan = plan_ranks(Scores({"a": layer, "b": layer}), PlanSettings(keep_params=0.75), limits={"a": limit})
    assert plan.layers["a"].reason in ("", limit.reason)
    assert plan.ratio <= 0.75


@given(form_times((40, 40)), st.integers(1, 40), st.integers(1, 40))
def test_a_larger_rank_never_counts_as_faster(times, one, other):
    small, large = sorted((one, other))
    assert (at_rank(times, small) <= at_rank(times, large)).all()
    for rank, measured in zip(times.ranks, times.times, strict=True):
        assert (at_rank(times, rank) >= measured).all()


def test_the_step_of_ranks_is_the_smallest_that_is_not_punished():
    assert liked_multiple({0: 10.0, 1: 9.9, 8: 9.5, 16: 9.3, 32: 8.8}) == 1
    assert liked_multiple({0: 10.0, 1: 12.0, 8: 11.0, 16: 9.3, 32: 8.8}) == 16
    assert liked_multiple({0: 10.0, 1: 9.0, 8: 11.0, 16: 12.0, 32: 8.8}) == 32
    assert liked_multiple({0: 10.0, 1: 12.0, 8: 12.0, 16: 12.0, 32: 12.0}) == 32


@pytest.mark.parametrize("form", ["stacked", "pivoted"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (192, 576), (576, 576), (4096, 14336)])
def test_the_grid_holds_allowed_ranks(shape, form):
    ranks = rank_grid(shape, form)
    assert list(ranks) == sorted(set(ranks))
    assert 1 <= ranks[0] <= ranks[-1] <= min(shape)


def test_a_profile_survives_its_file_and_grows():
    times = FormTimes((36.0, 900.0), (100, 200), ((20.0, 500.0), (41.0, 800.0)))
    one = Profile(CONDITIONS, 8, {(300, 200): {"stacked": times}})
    assert Profile.from_json(one.to_json()) == one
    assert one.lacks({(300, 200), (1, 2)}, "stacked") == {(1, 2)}
    assert one.lacks({(300, 200)}, "pivoted") == {(300, 200)}
    both = one.completed_by(Profile(CONDITIONS, 32, {(300, 200): {"pivoted": times}}))
    assert both.multiple == 32
    assert set(both.layers[300, 200]) == {"stacked", "pivoted"}
    with pytest.raises(DataError):
        Profile.from_json('{"layers": 3}')


def edited(**changes: object) -> str:
    """Return a profile's text with a few keys, of the whole or of its one series, set to something else."""
    times = FormTimes((36.0, 900.0), (100, 200), ((20.0, 500.0), (41.0, 800.0)))
    document = json.loads(Profile(CONDITIONS, 8, {(300, 200): {"stacked": times}}).to_json())
    series = document["layers"]["300x200"]["stacked"]
    series.update({key: changes.pop(key) for key in list(changes) if key in series})
    return json.dumps(document | changes)


@given(
    st.sampled_from(["dense", "ranks", "times", "multiple", "conditions", "layers"]),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([10**30, 2**63, 1e308]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    ),
)
def test_any_profile_gives_limits_or_our_error(key, value):
    with suppress(DataError):
        profile = Profile.from_json(edited(**{key: value}))
        if not profile.lacks({(300, 200)}, "stacked"):
            limits(profile, {"a": (300, 200)}, "stacked", 64)


@pytest.mark.parametrize(
    "changes",
    [{"ranks": (100, 10**30)}, {"ranks": (100, 201)}, {"multiple": 10**9}, {"dense": (36.0,)}, {"dense": (1e400, 1)}],
)
def test_a_profile_that_no_measurement_gives_is_refused(changes):
    with pytest.raises(DataError, match="no latency profile"):
        Profile.from_json(edited(**changes))


NO_PROFILE = {
    "a text": (lambda path: path.write_text("notes"), DataError),
    "a folder": (lambda path: path.mkdir(), DataError),
    "a pipe": (os.mkfifo, DataError),
    "a link": (lambda path: path.symlink_to("nowhere"), RecipeError),
    "below a file": (lambda path: path.parent.rmdir() or path.parent.write_text("mine"), MachineError),
}


@pytest.mark.parametrize("case", NO_PROFILE)
def test_a_profile_that_cannot_be_kept_is_refused_before_training(tmp_path, case):
    (tmp_path / "x").mkdir()
    path, (make, error) = tmp_path / "x" / "p.json", NO_PROFILE[case]
    make(path)
    with pytest.raises(error) as raised:
        check_profile(load_recipe("tiny", ["optimise_for=latency", f"latency.profile={path}"]), tmp_path / "run")
    assert raised.value.fix
    check_profile(load_recipe("tiny", [f"latency.profile={path}"]), tmp_path / "run")  # it will not be read


def test_a_link_in_the_place_of_a_profile_is_not_replaced_by_a_plan(tiny_run, tmp_path):
    (tmp_path / "p.json").symlink_to("nowhere")
    ran = soco("plan", tiny_run, "--set", "optimise_for=latency", "--set", f"latency.profile={tmp_path / 'p.json'}")
    assert ran.code == 2
    assert "p.json is a link" in ran.err
    assert (tmp_path / "p.json").is_symlink()


def test_a_profile_that_is_new_leaves_nothing_before_it_is_measured(tmp_path):
    recipe = load_recipe("tiny", ["optimise_for=latency", f"latency.profile={tmp_path / 'p.json'}"])
    check_profile(recipe, tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [StoredForm(), StoredForm("stacked", 8), StoredForm("pivoted", 8)], ids=str)
def test_no_two_copies_of_a_timed_layer_are_equal(form):
    """ONNX Runtime packs equal matrices once: the copies are there so that weights come from memory."""
    source = CopiedLayer((24, 16), form, 3, bias=True)
    arrays = {name: source.read(name) for name in source.shapes}
    assert {name: array.shape for name, array in arrays.items()} == source.shapes
    matrices = [array.tobytes() for array in arrays.values() if array.ndim == 2]
    assert len(set(matrices)) == len(matrices) >= 3
    assert all(sorted(array) == list(range(24)) for name, array in arrays.items() if name.endswith("order"))


@pytest.mark.parametrize("weights", ["same", "int8", "int4"])
@pytest.mark.parametrize("shape", [(192, 576), (576, 576), (1536, 576), (512, 2048)])
def test_the_sessions_that_take_turns_do_not_fit_the_cache(shape, weights):
    export, bits = ExportSettings(weights=weights), {"same": 32, "int8": 8, "int4": 4}[weights]
    dense = _copies(shape, export) * shape[0] * shape[1] * bits // 8
    assert dense * sum([1, *SHARES]) > 0.8 * CACHE_BYTES


def test_a_profile_that_was_timed_in_another_way_is_not_used():
    device = Device("CPUExecutionProvider", 1, ExportSettings(), bias=False)
    document = json.loads(Profile(device.conditions(), 1, {}).to_json())
    assert Profile.from_json(json.dumps(document)).conditions == device.conditions()
    del document["conditions"]["timing"]
    assert Profile.from_json(json.dumps(document)).conditions != device.conditions()


def test_layers_are_really_measured(tmp_path, monkeypatch):
    """Smoke: every form and weight type times something; the file is used again. Small and few: no figure is judged."""
    monkeypatch.setattr("soco_export.bench.layer_timing.MOST_COPIES", 4)
    monkeypatch.setattr("soco_export.bench.layer_timing.SECONDS", 0.02)
    for weights, form in itertools.product(("same", "int4"), ("stacked", "pivoted")):
        device = Device("CPUExecutionProvider", 1, ExportSettings(weights=weights), bias=True, tokens=(1, 3))
        profile = measure_profile([(48, 32)], form, device, lambda event: None)
        times = profile.layers[48, 32][form]
        assert len(times.times) == len(times.ranks)
        assert all(len(row) == 2 and min(row) > 0 for row in (times.dense, *times.times))
    recipe = load_recipe("tiny", ["optimise_for=latency", "validate.threads=1", "latency.tokens=[1]", "keep_params=1"])
    layer = LayerScores(torch.linspace(1, 0, 32), torch.ones(32), None, (48, 32))
    scores = Scores({"a": layer, "b": layer}).importances()
    plan = plan_for(recipe, scores, tmp_path, lambda event: None)
    before = (tmp_path / "latency.json").read_bytes()
    assert plan_for(recipe, scores, tmp_path, lambda event: pytest.fail("measured twice")) == plan
    assert (tmp_path / "latency.json").read_bytes() == before
    plan_for(recipe.override(["export.weights=int8"]), scores, tmp_path, lambda event: None)
    assert (tmp_path / "latency.json").read_bytes() != before


def test_a_size_that_no_faster_layer_reaches_is_refused_with_the_reason(tmp_path):
    recipe = load_recipe(
        "tiny", ["optimise_for=latency", "validate.threads=1", "latency.tokens=[1]", "keep_params=0.5"]
    )
    layer = LayerScores(torch.linspace(1, 0, 32), torch.ones(32), None, (48, 32))
    scores = Scores({"a": layer}).importances()
    never = FormTimes((1.0,), (1,), ((2.0,),))
    device = Device("CPUExecutionProvider", 1, recipe.export, bias=False, tokens=(1,))
    slow = Profile(device.conditions(), 1, {(48, 32): {"stacked": never, "pivoted": never}})
    (tmp_path / "latency.json").write_text(slow.to_json())
    with pytest.raises(RecipeError, match="too few layers are faster") as refused:
        plan_for(recipe, scores, tmp_path, lambda event: None)
    assert "1.0000" in refused.value.fix
