"""The choice among the points of a sweep: never one past a limit, the best by the stated order, monotone."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from soco_export.report.choose import ORDERS, Bound, Pick, choose
from soco_export.report.frontier import frontier_table, frontier_text, read_frontier
from soco_export.report.material import FrontierPoint, Judgement
from soco_export.run.choice import parse_limits
from soco_train.errors import DataError, RecipeError
from tests.support.fresh import rng

FIGURES = {"bytes": True, "perplexity_ratio": True, "recovery": False, "decode_ms": True}


def some(random: np.random.Generator, low: float, high: float) -> float | None:
    return None if random.random() < 0.1 else float(random.uniform(low, high))


def points(random: np.random.Generator) -> list[FrontierPoint]:
    return [
        FrontierPoint(
            name=f"point {number}",
            bytes_ratio=float(random.uniform(0.1, 1)),
            perplexity_ratio=some(random, 1, 2),
            bytes=int(random.integers(1, 100)),
            recovery=some(random, 0.5, 1),
            decode_ms=some(random, 1, 10),
            gates=random.choice(get_args(Judgement), p=[0.5, 0.2, 0.1, 0.2]),
        )
        for number in range(int(random.integers(1, 12)))
    ]


def limits(random: np.random.Generator) -> list[Bound]:
    ends = {"bytes": (20, 100), "perplexity_ratio": (1.1, 2), "recovery": (0.5, 0.9), "decode_ms": (3, 10)}
    names = [name for name in FIGURES if random.random() < 0.6]
    return [Bound(name, name, float(random.uniform(*ends[name])), FIGURES[name]) for name in names]


def meets(point: FrontierPoint, limit: Bound) -> bool:
    found = getattr(point, limit.figure)
    return found is not None and (found <= limit.value if limit.at_most else found >= limit.value)


def figures(point: FrontierPoint, prefer: str) -> list[float]:
    order = {"quality": "perplexity_ratio bytes decode_ms", "bytes": "bytes perplexity_ratio decode_ms"}
    names = order.get(prefer, "decode_ms perplexity_ratio bytes").split()
    return [math.inf if getattr(point, name) is None else getattr(point, name) for name in names]


@pytest.mark.parametrize("prefer", list(ORDERS))
def test_the_best_of_those_that_fit_and_no_other(prefer: str) -> None:
    random = rng()
    for _ in range(300):
        all_points, ends = points(random), limits(random)
        found = choose(all_points, ends, prefer)
        fits = [p for p in all_points if p.gates != "failed" and all(meets(p, end) for end in ends)]
        assert (found.chosen is not None) == bool(fits)
        if found.chosen:
            assert found.chosen in fits
            assert figures(found.chosen, prefer) == min(figures(p, prefer) for p in fits)
        assert set(found.rejected) == {p.name for p in all_points} - {p.name for p in fits}


def test_a_relaxed_limit_gives_nothing_worse() -> None:
    random = rng()
    for _ in range(300):
        all_points, ends = points(random), limits(random)
        looser = [replace(end, value=end.value * (1 + random.random() * (1 if end.at_most else -0.5))) for end in ends]
        before, after = choose(all_points, ends), choose(all_points, looser)
        if before.chosen:
            assert after.chosen
            assert figures(after.chosen, "quality") <= figures(before.chosen, "quality")
        assert set(after.rejected) <= set(before.rejected)


def test_each_reason_names_the_limit_and_the_nearest_misses_least() -> None:
    small = FrontierPoint("small", 0.3, 1.5, bytes=30, decode_ms=2.0)
    large = FrontierPoint("large", 0.9, 1.1, bytes=90, decode_ms=2.0)
    unmeasured = FrontierPoint("dense int8", 0.4, None, bytes=40)
    ends = [Bound("--max-bytes", "bytes", 80), Bound("--max-ppl-ratio", "perplexity_ratio", 1.05)]
    found = choose([small, large, unmeasured], ends)
    assert found == Pick(None, found.rejected, large)  # 12.5 % too many bytes, small 43 % too much perplexity
    assert found.rejected["small"] == ("--max-ppl-ratio: perplexity_ratio is 1.5, above 1.05",)
    assert len(found.rejected["large"]) == 2
    assert (
        Bound("--max-bytes", "bytes", 11e6)
        .reason(replace(large, bytes=11227700))
        .endswith("bytes is 11,227,700, above 11,000,000")
    )
    assert Bound("--max-bytes", "bytes", 1e5).reason(replace(large, bytes=10**30)).endswith("1e+30, above 100000")
    assert found.rejected["dense int8"] == ("--max-ppl-ratio: perplexity_ratio was not measured",)


def test_the_file_gives_back_what_was_written(tmp_path) -> None:
    file = tmp_path / "frontier.json"
    all_points = (*points(rng()), FrontierPoint("0.8", 0.8, 1.1, perplexity_interval=(1.05, 1.15), decode=1.2))
    file.write_text(frontier_text(all_points))
    assert read_frontier(file) == all_points
    table = frontier_table(all_points)
    assert table is not None
    assert len(table.rows) == len(all_points)
    for broken in ("[]", "{", '{"sweep_version": 2, "points": []}', '{"sweep_version": 1, "points": [{"name": 3}]}'):
        file.write_text(broken)
        with pytest.raises(DataError, match="no frontier of a sweep"):
            read_frontier(file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((figure, value) for figure in ("perplexity_ratio", "decode_ms", "bytes") for value in (-1, True, "1")),
        ("bytes", 10**400),  # more than a float holds
        ("gates", "FAILED"),  # none of the words that are asked for: it would pass
        ("name", "point 1"),  # of two points of one name the rejected one would hide the other
    ],
)
def test_a_file_that_no_sweep_writes_is_not_weighed(tmp_path, field, value) -> None:
    file = tmp_path / "frontier.json"
    stored = json.loads(frontier_text([FrontierPoint(f"point {number}", 0.5, 1.1) for number in range(3)]))
    stored["points"][2][field] = value
    file.write_text(json.dumps(stored))
    with pytest.raises(DataError, match="no frontier of a sweep"):
        read_frontier(file)
    file.write_text(json.dumps({**stored, "points": []}))
    with pytest.raises(DataError, match="no frontier of a sweep"):
        read_frontier(file)


def test_a_ruined_model_is_the_last_that_is_chosen(tmp_path) -> None:
    file = tmp_path / "frontier.json"
    ruined, sound = FrontierPoint("ruined", 0.5, math.nan, bytes=5), FrontierPoint("sound", 0.6, 1.4, bytes=6)
    file.write_text(frontier_text([ruined, sound]))
    assert choose(read_frontier(file), []).chosen == sound
    assert choose(read_frontier(file), [], "speed").chosen == sound


@pytest.mark.parametrize("figure", ["max_ppl_ratio", "min_recovery", "max_decode_ms", "max_bytes"])
@pytest.mark.parametrize("number", ["nan", "-1", "inf", "-inf"])
def test_a_limit_that_everything_would_meet_is_none(figure, number) -> None:
    none = dict.fromkeys(["max_bytes", "max_ppl_ratio", "min_recovery", "max_decode_ms"])
    with pytest.raises(RecipeError, match=r"no limit|no size"):
        parse_limits(**{**none, figure: number if figure == "max_bytes" else float(number)})
