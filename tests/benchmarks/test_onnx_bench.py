"""The tables of benchmarks/speed, from made-up figures; and its random models against the description."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.speed import frontier, int4
from benchmarks.speed.frontier import Point, beaten_by, draw
from benchmarks.speed.frontier import markdown as frontier_table
from benchmarks.speed.models import (
    MODELS,
    RandomModel,
    architecture_of,
    forms_of,
    measured_plan,
    uniform_plan,
    write_model,
)
from benchmarks.speed.series import prefill_flops
from benchmarks.speed.table import floors, markdown
from soco_export.bench.layer_times import Conditions, FormTimes, Profile
from soco_export.onnx.inspect import summarise_graph
from soco_export.onnx.settings import ExportSettings

CONDITIONS = Conditions("cpu", "CPUExecutionProvider", 2, "1.32", "float32", "same", "", True, (1,))


def entry(name: str, size: int, flops: int, decode: float, prefill: float, speedup: float) -> dict[str, object]:
    ratio = (speedup, speedup - 0.02, speedup + 0.02)
    return {
        "name": name,
        "disk": size,
        "bytes": size,
        "flops": flops,
        "milliseconds": {"decode_128": decode, "prefill_512": prefill},
        "speedups": {"decode_128": ratio, "prefill_512": ratio},
    }


def test_floors_and_verdicts():
    dense = entry("dense", 1_000_000, 1000, 0.1, 10, 1)
    assert floors(entry("low", 500_000, 800, 0.06, 9, 1.5), dense) == pytest.approx((1.8, 1.0625))
    lines = [entry("good", 500_000, 800, 0.05, 9, 1.9), entry("near", 500_000, 800, 0.05, 9, 1.79)]
    text = markdown("t", [dense, *lines, entry("bad", 500_000, 500, 0.05, 9, 1.2)], 1e10)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines()[3:] if line}
    assert rows["good"].count("holds") == 2
    assert "within noise" in rows["near"]
    assert rows["bad"].count("**missed**") == 2
    assert "holds" not in rows["dense"]
    assert "100 %" in rows["dense"]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=8))
def test_a_point_is_beaten_exactly_if_it_is_off_the_frontier(pairs):
    points = [Point(str(i), "fp32", size, float(loss), 1, "t") for i, (size, loss) in enumerate(pairs)]
    for point in points:
        worse_than = [p for p in points if p.bytes <= point.bytes and p.perplexity <= point.perplexity]
        equal = all((p.bytes, p.perplexity) == (point.bytes, point.perplexity) for p in worse_than)
        assert (beaten_by(point, points) is None) == equal
    assert len(frontier_table(points).splitlines()) == len(points) + 4


def test_the_frontier_is_drawn_the_same_twice():
    pytest.importorskip("matplotlib")
    points = [Point("dense", "fp32", 100, 9.0, 1, "t"), Point("0.8", "int4", 20, 12.0, 1, "t")]
    assert draw(points) == draw(points)
    assert "<svg" in str(draw(points))


def test_points_are_kept_until_their_model_or_text_is_another(tmp_path, monkeypatch):
    """A killed command goes on, a changed model is measured again, and a point nobody names stays."""
    measured = []

    def measure(name, folder, weights, options, key):
        measured.append((name, weights))
        return Point(name, weights, 10, 2.0, 1, "t", key)

    monkeypatch.setattr(frontier, "measure", measure)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)

    def command(*names, weights=("fp32", "int4")):
        measured.clear()
        models = [f"{name}={tmp_path / name}" for name in names]
        frontier.main([*models, "--weights", *weights, "--out", str(tmp_path / "out")])
        return list(measured)

    assert command("a", weights=["fp32"]) == [("a", "fp32")]
    assert command("a", "b") == [("a", "int4"), ("b", "fp32"), ("b", "int4")]
    assert command("a", "b") == []
    (tmp_path / "b" / "model.safetensors").write_text("another")
    assert command("b") == [("b", "fp32"), ("b", "int4")]
    assert len(frontier.read(tmp_path / "out")) == 4


def test_random_models_have_the_planned_size(tmp_path, monkeypatch):
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
    monkeypatch.setitem(MODELS, "small", {**MODELS["1b"], **small, "num_key_value_heads": 1, "vocab_size": 512})
    architecture = architecture_of("small", tmp_path)
    flops = {}
    for keep in (1.0, 0.6):
        plan = uniform_plan(architecture, keep, "stacked", 8)
        assert keep - 0.15 < plan.ratio <= keep
        write_model(architecture, forms_of(plan), tmp_path, ExportSettings())
        flops[keep] = prefill_flops(tmp_path, 512)
        linears = sum(layer.params for layer in plan.layers.values())
        head, attention = 2 * 512 * 128, 2 * 4 * 512 * 512 * 128
        assert flops[keep] == 2 * linears * 512 + head + attention
        assert summarise_graph(tmp_path).flops_per_token == 2 * (linears + 512 * 128)
    assert flops[0.6] < flops[1.0]


@pytest.mark.parametrize("bias", [False, True])
def test_no_two_matrices_of_a_random_model_are_equal(tmp_path, bias):
    """ONNX Runtime packs equal matrices once, and what then comes from the cache says nothing about memory."""
    architecture = architecture_of("smollm2", tmp_path)
    forms = forms_of(uniform_plan(architecture, 0.6, "stacked", 32))
    model = RandomModel(architecture, forms, bias)
    names = [name for name in model.shapes if name.startswith(("model.layers.0.", "model.layers.1."))]
    arrays = [model.read(name) for name in names if len(model.shapes[name]) == 2]
    assert len({array.tobytes() for array in arrays}) == len(arrays) == 28
    assert any(name.endswith("up.bias") for name in names) == bias


def test_the_measured_plan_leaves_slow_shapes_dense(tmp_path):
    architecture = architecture_of("smollm2", tmp_path)
    shapes = {(576, 576), (192, 576), (1536, 576), (576, 1536)}
    fast, slow = FormTimes((9.0,), (32,), ((1.0,),)), FormTimes((1.0,), (32,), ((2.0,),))
    times = {shape: {"stacked": slow if shape == (192, 576) else fast} for shape in shapes}
    plan = measured_plan(architecture, 0.8, Profile(CONDITIONS, 32, times), "stacked")
    narrow = [layer for layer in plan.layers.values() if layer.shape == (192, 576)]
    assert all(layer.reason.startswith("measured 2.0 µs at rank 32 against 1.0 µs dense") for layer in narrow)
    assert plan.ratio <= 0.8
    assert np.isclose(plan.ratio, 0.8, atol=0.01)


def test_the_int4_series_packs_as_genai_does_and_says_where_a_step_goes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        int4,
        "_theirs",
        lambda name, work: int4.write_own(
            architecture_of(name, work / "stand-in"), {}, work / "stand-in", work / "theirs", int4.LIKE
        ),
    )
    int4.main(["--models", "7b-small", "--seconds", "0", "--threads", "1", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "7b-small.json").read_text())
    entries = {entry["name"]: entry for entry in found["entries"]}
    assert list(entries) == [int4.THEIRS, "dense", "0.8 stacked", "0.6 stacked", "dense, as shipped"]
    assert entries["dense"]["disk"] == entries[int4.THEIRS]["disk"] < entries["dense, as shipped"]["disk"]
    assert entries["0.6 stacked"]["disk"] < entries["0.8 stacked"]["disk"]
    for profile in found["profiles"].values():
        assert profile["MatMulNBits"] > 0
        assert list(profile.values()) == sorted(profile.values(), reverse=True)
