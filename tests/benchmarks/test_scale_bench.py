"""The benchmarks of speed and size: the arithmetic of their estimates, and a short run of each on a small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.scale.estimate import Sizes, hours_of_decomposition, training
from benchmarks.scale.parts import Size, Unit, do, random_model, shapes
from benchmarks.throughput import run as throughput
from benchmarks.throughput.models import rotation
from soco_export.recipe.load import load_recipe
from soco_train.modules.layers import select_linears

SIZES = Sizes([(6, 4), (4, 6), (5, 5)], head=70)


@given(st.integers(1, 40), st.booleans())
def test_step_flops_are_two_for_each_multiplication_of_each_pass(layers: int, recomputed: bool) -> None:
    dense = layers * (24 + 24 + 25)
    factors = layers * (40 + 40 + 50)
    teacher, forward, backward = dense + 70, factors + 70, factors + 70
    again = factors if recomputed else 0
    assert SIZES.step_flops(layers, recomputed) == 2 * (teacher + forward + backward + again)


@given(st.floats(0.1, 100), st.integers(1, 8))
def test_what_was_measured_is_what_is_estimated_for_as_many_layers(seconds: float, layers: int) -> None:
    part = {"tokens": 64, "step_seconds": [seconds] * 3, "size": {"layers": layers}}
    found = training(part, SIZES, layers, tokens=6400, recomputed=True)
    assert found["tokens_per_second_all_layers"] == pytest.approx(64 / seconds)
    assert found["hours_all_tokens"] == pytest.approx(100 * seconds / 3600)
    twice = training(part, SIZES, 2 * layers, tokens=6400, recomputed=True)
    assert 1 < twice["hours_all_tokens"] / found["hours_all_tokens"] < 2, "the head is there once"


def test_one_layer_speaks_for_its_shape_in_every_block_or_all_speak_for_themselves() -> None:
    one = {"a": {"layers": {"q": 3.0}}, "b": {"layers": {"up": 5.0}}}
    assert hours_of_decomposition(one, {"q": 2, "up": 1}, layers=10) == pytest.approx(10 * (2 * 3 + 5) / 3600)
    every = {"a": {"layers": {"0.q": 3.0, "1.q": 4.0}}}
    assert hours_of_decomposition(every, {"q": 2}, layers=10) == pytest.approx(7 / 3600)


def test_components_that_stand_in_for_real_ones_give_the_weight() -> None:
    for shape in ((5, 9), (9, 5), (6, 6)):
        linear = torch.nn.Linear(shape[1], shape[0])
        for parts in (rotation(linear), Unit({"x": linear})["x"]):
            torch.testing.assert_close(parts.P @ parts.B, linear.weight.detach(), rtol=0, atol=1e-5)
            assert parts.P.shape[1] == min(shape)


def test_the_shapes_of_a_block_cover_it() -> None:
    recipe = load_recipe("tiny")
    model = random_model(recipe, 2)
    found = shapes(model, recipe)
    names = {name for group in found.values() for name in group}
    assert names == {name for name in select_linears(model, recipe.layers) if ".layers.0." in name}


def test_throughput_writes_its_ratios_and_its_page(tmp_path: Path) -> None:
    out = tmp_path / "tiny"
    throughput.main(["--model", "tiny", "--block", "8", "--rounds", "2", "--out", str(out)])
    document = json.loads(out.with_suffix(".json").read_text())
    assert document["keep"] <= 0.6
    for name, (low, high) in document["spread"].items():
        assert 0 < low <= document["ratios"][name] <= high
    assert document["multiplications"]["scores full"] < 1 < document["multiplications"]["scores cut"]
    assert "| every component |" in out.with_suffix(".md").read_text()


def test_each_part_of_the_scale_benchmark_says_what_it_took(tmp_path: Path) -> None:
    recipe, size = load_recipe("tiny"), Size(layers=1, block=16, sequences=1, steps=2, keep=0.6)
    name = "model.layers.0.self_attn.k_proj"
    assert list(do(f"decompose:{name}", recipe, size, tmp_path)["layers"]) == [name]
    assert len(do("train", recipe, size, tmp_path)["step_seconds"]) == 2
    cut = do("cut", recipe, size, tmp_path)
    assert cut["parameters"][1] < cut["parameters"][0]
    assert cut["bytes"]["onnx"] >= 2 * cut["parameters"][1]
