import math
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from soco_export.recipe.load import list_recipes, load_recipe
from soco_export.report.gates import GATES, GateSettings, Precision, judge

EXPORT_KL = ("parity.export.prefill.mean_kl", "parity.export.decode.mean_kl")
NUMBERS = st.floats(min_value=1e-9, max_value=1e9)


def test_every_setting_has_a_gate_and_none_is_judged_by_default():
    assert {gate.key for gate in GATES} == set(GateSettings.model_fields)
    assert judge({}, GateSettings()) == ()


@given(NUMBERS, NUMBERS)
def test_a_figure_passes_exactly_on_its_side_of_the_threshold(figure, threshold):
    (most,) = judge({"perplexity.ratio": figure}, GateSettings(max_ppl_ratio=threshold))
    (least,) = judge({"latency.workloads.decode_128.speedup.value": figure}, GateSettings(min_decode_speedup=threshold))
    assert most.passed == (figure <= threshold)
    assert least.passed == (figure >= threshold)
    assert (most.figure, most.threshold) == (figure, threshold)


@given(NUMBERS)
def test_nothing_is_rounded_before_it_is_compared(threshold):
    above = math.nextafter(threshold, math.inf)
    (verdict,) = judge({"perplexity.ratio": above}, GateSettings(max_ppl_ratio=threshold))
    assert not verdict.passed
    assert repr(above) in verdict.message
    assert repr(threshold) in verdict.message


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.key)
@pytest.mark.parametrize("figure", [None, math.nan, "absent"])
def test_a_missing_or_nan_figure_fails_its_gate_and_is_named(gate, figure):
    names = [name.replace("*", "_x") for name in gate.figures]
    figures = {name: 0.5 for name in names}
    figures[names[-1]] = figure
    if figure == "absent":
        del figures[names[-1]]
    (verdict,) = judge(figures, GateSettings(**{gate.key: 0.5}))
    assert not verdict.passed
    assert (gate.figures[-1] if figure == "absent" else names[-1]) in verdict.message


def test_the_worst_of_several_figures_is_judged():
    figures = dict(zip(EXPORT_KL, (1e-9, 2e-3), strict=True))
    (verdict,) = judge(figures, GateSettings(max_export_kl=1e-4))
    assert (verdict.source, verdict.figure, verdict.passed) == (EXPORT_KL[1], 2e-3, False)
    assert verdict.message == "parity.export.decode.mean_kl is 0.002, above 0.0001"
    speeds = {"latency.workloads.prefill_128.speedup.value": 1.3, "latency.workloads.prefill_512.speedup.value": 0.9}
    (verdict,) = judge(speeds, GateSettings(min_prefill_speedup=1.0))
    assert (verdict.figure, verdict.passed) == (0.9, False)


SPEED = "latency.workloads.decode_128.speedup"


@given(st.tuples(NUMBERS, NUMBERS, NUMBERS).map(sorted), NUMBERS)
def test_a_speed_is_judged_by_its_interval_and_not_by_its_value(ends, threshold):
    low, value, high = ends
    figures = {f"{SPEED}.low": low, f"{SPEED}.value": value, f"{SPEED}.high": high}
    (verdict,) = judge(figures, GateSettings(min_decode_speedup=threshold))
    wanted = "passed" if low >= threshold else "failed" if high < threshold else "inconclusive"
    assert verdict.state == wanted
    assert (verdict.passed, verdict.inconclusive) == (wanted == "passed", wanted == "inconclusive")
    assert (verdict.figure, verdict.interval) == (value, (low, high))
    assert {"passed": "at least", "failed": "below", "inconclusive": "too uncertain"}[wanted] in verdict.message


def test_of_several_speeds_a_failure_counts_before_one_that_is_unsure():
    speeds = {"prefill_128": (0.5, 0.7, 1.2), "prefill_512": (0.8, 0.85, 0.9), "prefill_900": (1.1, 1.2, 1.3)}
    figures = {
        f"latency.workloads.{name}.speedup.{end}": number
        for name, ends in speeds.items()
        for end, number in zip(("low", "value", "high"), ends, strict=True)
    }
    (verdict,) = judge(figures, GateSettings(min_prefill_speedup=1.0))
    assert (verdict.state, verdict.figure) == ("failed", 0.85)
    del figures["latency.workloads.prefill_512.speedup.value"]
    (verdict,) = judge(figures, GateSettings(min_prefill_speedup=1.0))
    assert (verdict.state, verdict.figure) == ("inconclusive", 0.7)


def test_nan_beside_a_good_figure_is_the_worst():
    for values in ((math.nan, 0.0), (0.0, math.nan)):
        (verdict,) = judge(dict(zip(EXPORT_KL, values, strict=True)), GateSettings(max_export_kl=1.0))
        assert not verdict.passed
        assert "NaN" in verdict.message


def test_thresholds_that_mean_nothing_are_refused():
    with pytest.raises(ValidationError):
        GateSettings(min_token_agreement=1.5)
    with pytest.raises(ValidationError):
        GateSettings(max_export_kls=1)


class TestPrecision:
    GATES = GateSettings(max_export_kl={"float32": 1e-4, "int8": 0.01}, max_ppl_ratio=2)

    @pytest.mark.parametrize(
        ("dtype", "weights", "limit"),
        [
            ("float32", "same", 1e-4),
            ("float32", "int8", 0.01),
            ("bfloat16", "int8", 0.01),
            ("float16", "same", None),
            ("float32", "int4", None),
        ],
    )
    def test_the_threshold_is_that_of_what_is_rounded_to(self, dtype: str, weights: str, limit: float | None) -> None:
        assert self.GATES.at(dtype, weights) == GateSettings(max_export_kl=limit, max_ppl_ratio=2)

    def test_one_number_holds_for_all(self) -> None:
        assert GateSettings(max_export_kl=0.5).at("float32", "int4").max_export_kl == 0.5

    def test_an_unknown_precision_or_a_share_above_one_is_refused(self) -> None:
        for wrong in ({"int3": 0.5}, {"int4": 1.5}, 1.5):
            with pytest.raises(ValueError, match="min_token_agreement"):
                GateSettings(min_token_agreement=wrong)


@pytest.mark.parametrize("name", list_recipes())
def test_every_shipped_recipe_judges_quality_at_every_precision(name: str) -> None:
    gates = load_recipe(name).gates
    assert gates.max_ppl_ratio is not None
    assert gates.max_ppl_ratio <= 1.5
    for precision in get_args(Precision):
        assert gates.at("float32", precision).max_export_kl is not None
        assert gates.at("float32", precision).min_token_agreement is not None
