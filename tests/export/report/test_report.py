import dataclasses
import json
import math
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from soco_export.bench.figures import LatencyFigures, Machine, MemoryFigures, PeakMemory, Roofline, WorkloadFigures
from soco_export.bench.stats import paired_ratio, summarise_rounds
from soco_export.evaluate.figures import ParityFigures, PerplexityFigures, StepParity, TaskComparison, TaskFigures
from soco_export.evaluate.forgetting import compare_readings, compare_texts
from soco_export.evaluate.perplexity import Readings
from soco_export.files.text import human_bytes, visible
from soco_export.report.compare import compare_results, render_comparison
from soco_export.report.gates import GateSettings, Verdict
from soco_export.report.junit import render_junit
from soco_export.report.material import FrontierPoint, Material, Sample
from soco_export.report.pages import plots
from soco_export.report.pages.html import render_html
from soco_export.report.pages.markdown import render_comment, render_markdown
from soco_export.report.pages.tables import all_tables
from soco_export.report.rendering import number, percent
from soco_export.report.schema import (
    ModelFigures,
    ParityResults,
    PerplexityResults,
    Results,
    SizeFigures,
)
from soco_export.report.sentences import verdict_line, verdict_sentence
from soco_export.report.words import PLAIN, SIGNS, verdict_words
from soco_export.run.stages.report import _largest_coefficient, slower
from soco_train.errors import DataError
from soco_train.forms.pivoted import pivot_factors
from soco_train.forms.stacked import StackedFactors
from soco_train.plan.rank_plan import LayerPlan
from soco_train.store.factors import Factors
from tests.support import fresh

GATES = GateSettings(max_export_kl=1e-4, max_ppl_ratio=1.5, min_decode_speedup=1.0)


CURVES = [
    *({"stage": "train", "step": step, "phase": step // 5, "kl": 1 / step, "soft": 0.9, "hard": 0.8, "lr": 0.1}
      for step in range(1, 15)),
    *({"stage": "distill", "step": step, "kl": 1 / step, "lr": 0.1} for step in range(1, 9)),
    {"stage": "distill", "step": 9, "kl": 0.1, "held-out loss": 0.2, "lr": 0.1},
]  # fmt: skip
MATERIAL = Material(
    layers={
        f"model.layers.{layer}.{part}": LayerPlan((8, 8), 8 if layer else 2, bool(layer), 32, "")
        for layer in range(3)
        for part in ("mlp.up_proj", "mlp.experts.0.w1", "mlp.experts.1.w1")
    },
    curves=CURVES,
    samples=[Sample("once upon", "a <b> c", "a b d")],
    command="soco-export train-and-export --model smol",
    frontier=[FrontierPoint("0.8", 0.8, 1.1, chosen=True), FrontierPoint("0.6", 0.6, 1.3)],
)


def parity(rng, scale):
    one = ParityFigures(512, scale * rng.uniform(), scale * rng.uniform(1, 9), rng.uniform(), rng.uniform(0.9, 1))
    return StepParity(one, replace(one, positions=64), rng.uniform(0.5, 1))


def forgetting(rng):
    """What a model that is 0.1 nats worse has forgotten of two texts."""
    blocks = rng.integers(0, 40, (6, 33)) * rng.integers(0, 2, (6, 33))
    shape = (6, 32)
    readings = [
        Readings(
            rng.uniform(1, 2, shape) + worse,
            rng.uniform(1, 3, shape),
            rng.uniform(0, 1, shape),
            rng.integers(0, 9, shape),
        )
        for worse in (0.0, 0.1)
    ]
    texts = compare_texts([np.arange(20)], [np.zeros(20, dtype=np.int64)])
    return compare_readings(*readings, blocks, ["prose", "code"] * 3, texts)


def workload(rng, tokens, past):
    times = rng.uniform(1, 2, (2, 30, 1))
    flat = [summarise_rounds(rounds) for rounds in times]
    return WorkloadFigures(tokens, past, *flat, 100.0, 150.0, paired_ratio(times[0] * 1.5, times[1]))


@pytest.fixture
def rng():
    return fresh.rng()


@pytest.fixture
def results(rng):
    ppl = [PerplexityFigures(math.exp(loss), loss, 1022) for loss in rng.uniform(2, 3, 3)]
    task = TaskFigures(200, 0.5, 0.55, 0.035)
    line = Roofline(10**8, 2e10, 5.0, 6.25, 0.8)
    return Results(
        format="onnx",
        model=ModelFigures(name="smol", source="HuggingFaceTB/SmolLM2-135M", architecture="LlamaForCausalLM"),
        recipe={"keep_params": 0.8, "train": {"steps": 200}, "data": {"builtin": "time-machine"}},
        sizes=SizeFigures(
            params_before=134_515_008, params_after=113_300_000, selected_before=106_168_320, selected_after=84_934_656,
            layers=210, layers_dense=31, keep_params=0.8, storage="stacked",
            bytes={"onnx": 453_200_000}, bytes_ratio=0.84,
        ),
        parity=ParityResults(compression=parity(rng, 0.1), export=parity(rng, 1e-9)),
        perplexity=PerplexityResults.of((ppl[0], ppl[1], ppl[2]), "builtin: time-machine", "ab" * 32, 512),
        tasks={"copa": TaskComparison(task, replace(task, acc=0.48), 0.9, 0.06, 0.96)},
        forgetting=forgetting(rng),
        latency=LatencyFigures(
            "CPUExecutionProvider", 2, 30, {"prefill_128": workload(rng, 128, 0), "decode_128": workload(rng, 1, 128)},
            {"prefill_512": "the model's context ends at 256 tokens"}, {"dense": line, "compressed": line},
        ),
        memory=MemoryFigures(PeakMemory(10**9, 10**8), PeakMemory(8 * 10**8, 10**8), 0.8),
        machine=Machine("A <fast> CPU | odd", 2, 8 * 10**9, None, "Linux x86_64", 2, {"python": "3.11.1"}),
        placement={"CPUExecutionProvider": {"MatMul": 420}},
        notes=("attention is unfused: opset 23",),
        provenance={"seed": 0},
    )  # fmt: skip


def test_results_survive_the_file_bit_for_bit(results, tmp_path):
    path = tmp_path / "results.json"
    results.judged(GATES).save(path)
    assert Results.load(path) == results.judged(GATES)
    assert Results.load(tmp_path) == Results.load(path)
    assert json.loads(path.read_text(encoding="utf-8"))["schema_version"] == 1
    assert not list(tmp_path.glob("*.partial"))


def test_nan_and_infinity_do_not_vanish_in_the_file(results, tmp_path):
    sick = replace(results.parity.export.decode, mean_kl=math.nan, max_kl=math.inf)
    export = replace(results.parity.export, decode=sick)
    broken = results.model_copy(update={"parity": ParityResults(export=export)})
    broken.save(tmp_path / "results.json")
    back = Results.load(tmp_path)
    assert math.isnan(back.parity.export.decode.mean_kl)
    assert back.parity.export.decode.max_kl == math.inf
    assert not back.judged(GATES).passed
    json.loads((tmp_path / "results.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)  # strict JSON


def test_files_that_are_no_results_are_refused(results, tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(DataError, match="cannot read"):
        Results.load(path)
    for text in ("", "{}", results.model_dump_json().replace('"schema_version":1', '"schema_version":2')):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(DataError, match="no results of schema version 1"):
            Results.load(path)


def test_the_schema_names_every_section_and_has_a_version():
    schema = Results.model_json_schema()
    assert schema["properties"]["schema_version"]["const"] == 1
    assert {
        "model",
        "recipe",
        "sizes",
        "parity",
        "perplexity",
        "tasks",
        "latency",
        "memory",
        "machine",
        "verdicts",
    } <= (schema["properties"].keys())


def test_figures_are_all_numbers_by_dotted_name(results):
    figures = results.figures()
    assert figures["parity.export.decode.mean_kl"] == results.parity.export.decode.mean_kl
    assert figures["perplexity.ratio"] == results.perplexity.onnx.value / results.perplexity.dense.value
    assert (
        figures["latency.workloads.decode_128.speedup.value"] == results.latency.workloads["decode_128"].speedup.value
    )
    assert figures["tasks.copa.recovery"] == 0.96
    assert not any(name.startswith(("recipe", "machine", "provenance")) for name in figures)


def test_the_ratio_is_of_what_ships():
    dense, low_rank = PerplexityFigures(10.0, 2.3, 5), PerplexityFigures(12.0, 2.5, 5)
    assert PerplexityResults.of((dense, low_rank, None), "", "", 8).ratio == 1.2
    assert PerplexityResults.of((dense, low_rank, PerplexityFigures(13.0, 2.6, 5)), "", "", 8).ratio == 1.3


def test_a_workload_that_low_rank_loses_is_a_note_with_advice(results):
    def timed(low, high, optimise_for):
        work = results.latency.workloads["decode_128"]
        work = replace(work, speedup=replace(work.speedup, value=(low + high) / 2, low=low, high=high))
        latency = replace(results.latency, workloads={"decode_128": work})
        recipe = {**results.recipe, "optimise_for": optimise_for}
        return list(slower(results.model_copy(update={"latency": latency, "recipe": recipe})))

    assert timed(0.9, 1.1, "params") == []  # within noise
    assert timed(0.7, 0.9, "latency") == ["slower than dense: decode_128 0.80×"]
    assert "optimise_for: latency leaves" in timed(0.7, 0.9, "params")[0]
    assert list(slower(results.model_copy(update={"latency": None}))) == []


def test_every_gate_finds_its_figure_in_full_results(results):
    everything = {name: 1e9 if name.startswith("max") else 0.0 for name in GateSettings.model_fields}
    everything = {name: value or (1e-9 if "speedup" in name else 0.0) for name, value in everything.items()}
    judged = results.judged(GateSettings(**everything))
    assert len(judged.verdicts) == len(everything)
    assert judged.passed, [verdict.message for verdict in judged.verdicts if not verdict.passed]


def test_a_gate_on_what_was_not_measured_fails(results):
    judged = results.model_copy(update={"latency": None}).judged(GATES)
    assert not judged.passed
    assert verdict_line(judged).startswith("FAILED: 1 of 3 gates (min_decode_speedup)") or "max_ppl" in verdict_line(
        judged
    )
    assert "was not measured" in next(v for v in judged.verdicts if v.name == "min_decode_speedup").message


def test_the_verdict_line():
    good, bad = Verdict("a", "x", 1.0, 2.0, True, ""), Verdict("b", "y", 3.0, 2.0, False, "")
    base = Results.model_construct
    assert verdict_line(base(verdicts=(good, good))) == "PASSED: 2 of 2 gates"
    assert verdict_line(base(verdicts=(good, bad))) == "FAILED: 1 of 2 gates (b)"
    assert verdict_line(base(verdicts=())) == "NOT JUDGED: the recipe sets no gate"


@pytest.mark.parametrize(
    ("low", "value", "high", "said"),
    [
        (1.1, 1.2, 1.3, "decode 1.20 × as fast"),
        (0.7, 0.8, 0.9, "decode 0.80 × as fast"),
        (0.9, 1.2, 1.5, "decode as fast as dense, within the noise"),
    ],
)
def test_the_verdict_sentence_claims_no_speed_within_the_noise(results, low, value, high, said):
    work = results.latency.workloads["decode_128"]
    work = replace(work, speedup=replace(work.speedup, low=low, value=value, high=high))
    latency = replace(results.latency, workloads={"decode_128": work})
    run = results.model_copy(update={"latency": latency})
    picture = next(plot for plot in plots.draw_plots(run)[0] if plot.title == "Time beside the dense model")
    assert ("within the noise" in picture.text) == (low <= 1 <= high)
    sentence = verdict_sentence(run)
    assert said in sentence
    assert f"{results.sizes.bytes_ratio:.2f} × the bytes" in sentence
    assert f"perplexity {results.perplexity.ratio:.3f} × dense" in sentence


def test_markdown_has_the_verdict_first_and_whole_tables(results):
    text = render_markdown(results.judged(GATES), MATERIAL)
    assert text.splitlines()[0].startswith("## smol: ")
    first, _, folded = text.partition("<details>")
    assert len(first.splitlines()) < 40
    assert all(f"- {SIGNS[verdict.state]} " in first for verdict in results.judged(GATES).verdicts)
    assert "keep_params: 0.8" in folded
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("| ")]
    assert len(blocks) == 14
    for block in blocks:
        assert len({line.replace("\\|", "").count("|") for line in block}) == 1
    assert "n/a (n=30)" in text
    assert "Skipped prefill_512: the model's context ends at 256 tokens." in text
    assert "31 of 210 selected layers left dense" in text
    assert "> attention is unfused" in first
    assert "soco-export train-and-export" in text


def test_the_comment_is_the_first_screen(results):
    judged = results.judged(GATES)
    comment = render_comment(judged)
    assert render_markdown(judged).startswith(comment.rstrip("\n"))
    assert "<details>" not in comment
    assert len(comment.splitlines()) < 40


def test_what_is_dense_stands_under_dense(results):
    sizes = results.sizes.model_copy(update={"bytes": {"hf": 7_000_000, "onnx": 8_000_000, "onnx-dense": 10_000_000}})
    rows = {row[0]: row[1:] for row in all_tables(results.model_copy(update={"sizes": sizes}))[0].rows}
    assert rows["on disk: onnx"] == ("10.0 MB", "8.0 MB", "0.800 ×")
    assert rows["on disk: hf"] == ("", "7.0 MB", "")
    assert "on disk: onnx-dense" not in rows


@pytest.mark.parametrize("name", GateSettings.model_fields)
def test_every_gate_has_words_with_both_numbers(name):
    at_most = name.startswith("max")
    for figure in (0.5, 0.5000001, 3.25):
        threshold = 0.5
        passed = figure <= threshold if at_most else figure >= threshold
        words = verdict_words(Verdict(name, "x", figure, threshold, passed, "message"))
        assert "message" not in words
        assert ("not at" in words) == (not passed)
        found, _, limit = words.removeprefix(PLAIN[name][0] + ": ").partition(", ")
        assert (found.split()[0] == limit.split()[-2 if PLAIN[name][1] else -1]) == (figure == threshold)
    assert "not measured" in verdict_words(Verdict(name, "x", None, 0.5, False, ""))
    unsure = Verdict(name, "x", 0.6, 0.5, False, "", interval=(0.4, 0.7), inconclusive=True)
    assert "0.4 to 0.7" in verdict_words(unsure)
    assert "too uncertain" in verdict_words(unsure)


def test_markdown_of_a_run_that_measured_little(results):
    bare = results.model_copy(
        update={
            "parity": ParityResults(),
            "perplexity": None,
            "tasks": {},
            "latency": None,
            "memory": None,
            "forgetting": None,
        }
    )
    text = render_markdown(bare)
    assert "NOT JUDGED" in text
    assert "Perplexity" not in text
    assert "Latency" not in text
    assert "No plots: nothing" in render_html(bare)


class Tags(HTMLParser):
    VOID = frozenset({"meta", "path", "use"})

    def __init__(self):
        super().__init__()
        self.open, self.links, self.seen, self.ids = [], [], set(), []

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href") or name.endswith(":href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.ids += [value for name, value in attrs if name == "id"]
        self.links += [value for name, value in attrs if name in ("src", "href") or name.endswith(":href")]

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_only_pivoted_storage_has_a_largest_coefficient(results, tmp_path):
    assert "coefficients" not in render_markdown(results)
    pivoted = results.sizes.model_copy(update={"storage": "pivoted", "largest_coefficient": 1.0312})
    assert "Pivots combine with coefficients of at most 1.03." in render_markdown(
        results.model_copy(update={"sizes": pivoted})
    )
    weight = torch.randn(6, 3)
    stacked = StackedFactors(weight, torch.randn(3, 5), None)
    layers = {"a": stacked, "b": pivot_factors(stacked), "c": pivot_factors(StackedFactors(weight[:3], weight.T, None))}
    Factors(layers).save(tmp_path / "mixed.safetensors")
    Factors({"a": stacked}).save(tmp_path / "stacked.safetensors")
    assert _largest_coefficient(tmp_path / "mixed.safetensors") == float(layers["b"].mix.abs().max())
    assert _largest_coefficient(tmp_path / "stacked.safetensors") is None


def test_html_stands_alone_and_escapes(results):
    text = render_html(results.judged(GATES), MATERIAL)
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert all(link.startswith("#") for link in tags.links)
    assert not {"link", "script", "img", "iframe"} & tags.seen
    assert "url(http" not in text
    assert "A &lt;fast&gt; CPU" in text
    assert text.count("<svg") == 6
    assert len(tags.ids) == len(set(tags.ids))
    assert text.count("<desc") == text.count('role="img"') == 6
    assert "#010203" not in text
    assert "a &lt;b&gt; c" in text


def test_html_says_why_there_are_no_plots(results, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plots.ABSENT.replace("'", "&#39;") in render_html(results)
    assert plots.draw_plots(results) == ([], plots.ABSENT)


def test_the_same_results_give_the_same_html(results):
    assert render_html(results) == render_html(results)


def test_junit_has_one_case_per_gate_and_names_figure_and_threshold(results):
    judged = results.judged(GATES.model_copy(update={"max_bytes_ratio": 0.5}))
    root = ElementTree.fromstring(render_junit(judged))
    suite = root.find("testsuite")
    cases = {case.get("name"): case for case in suite.findall("testcase")}
    assert set(cases) == {verdict.name for verdict in judged.verdicts}
    failed = {verdict.name for verdict in judged.verdicts if not verdict.passed}
    assert int(suite.get("tests")) == len(cases)
    assert int(root.get("failures")) == int(suite.get("failures")) == len(failed)
    assert {name for name, case in cases.items() if case.find("failure") is not None} == failed
    failure = cases["max_bytes_ratio"].find("failure")
    assert failure.get("message").startswith("bytes on disk beside the dense model: 0.84 ×, not at most 0.5 ×")
    assert "sizes.bytes_ratio is 0.84, above 0.5" in failure.get("message")
    assert failure.text == "sizes.bytes_ratio = 0.84, threshold max_bytes_ratio = 0.5"


def test_junit_survives_what_xml_does_not_allow(results):
    strange = results.model_copy(update={"model": results.model.model_copy(update={"name": 'a"<\x00&\x1b'})})
    versions = dataclasses.replace(results.machine, versions={"torch": "\x1b[2J", "a\x00": "b"})
    strange = strange.model_copy(update={"machine": versions, "provenance": {"started": "\x07+"}})
    text = render_junit(strange.judged(GATES), command="soco-export \x1b[2J\u202e")
    ElementTree.fromstring(text)
    assert visible(text) == text


def test_comparing_a_result_with_itself_recovers_all_of_it(results):
    comparison = compare_results(results, results)
    assert comparison.settings == {}
    assert comparison.figures
    assert all(d.one == d.two and d.recovery in (1.0, None) for d in comparison.figures)


def test_recovery_is_above_one_where_the_second_is_better(results):
    better = results.model_copy(
        update={
            "perplexity": results.perplexity.model_copy(update={"ratio": results.perplexity.ratio / 2}),
            "tasks": {"copa": replace(results.tasks["copa"], recovery=1.2)},
            "recipe": {**results.recipe, "train": {"steps": 400, "lr": 0.1}},
        }
    )
    comparison = compare_results(results, better)
    recovery = {d.name: d.recovery for d in comparison.figures}
    assert recovery["perplexity.ratio"] == pytest.approx(2)
    assert recovery["tasks.copa.recovery"] == pytest.approx(1.25)
    assert comparison.settings == {"train.steps": (200, 400), "train.lr": (None, 0.1)}
    text = render_comparison(comparison)
    assert ["train.steps", "200", "400"] in [line.split() for line in text.splitlines()]
    assert max(map(len, text.splitlines())) <= 80
    json.dumps(comparison.document())


def measured(results, rng, worse, fingerprint="ab"):
    """The same dense model, and what ships `worse` nats worse on every block, give or take."""
    dense = np.linspace(2, 4, 32)
    forms = [
        PerplexityFigures(math.exp(np.mean(losses)), float(np.mean(losses)), 32 * 511, tuple(losses))
        for losses in (dense, dense + 0.1, dense + 0.1 + worse + rng.normal(0, 0.002, 32))
    ]
    return results.model_copy(update={"perplexity": PerplexityResults.of(tuple(forms), "a text", fingerprint, 512)})


def test_perplexities_on_the_same_blocks_are_compared_block_by_block(results, rng):
    first = measured(results, rng, 0)
    for worse, beyond in ((0.01, True), (0, False)):
        # The chance of a difference that is none is 5 %; two runs of the very same model have exactly none.
        second = measured(results, rng, worse) if worse else first
        found = {d.name: d.beyond_noise for d in compare_results(first, second).figures}
        assert found["perplexity.onnx.value"] == found["perplexity.ratio"] == beyond
        assert found["perplexity.dense.value"] is False
    assert "a text, 512 tokens a window" in render_comparison(compare_results(first, first))
    other = compare_results(first, measured(results, rng, 0.01, "cd"))
    assert {d.name: d.beyond_noise for d in other.figures}["perplexity.ratio"] is None
    assert "Perplexity is of two texts and no comparison" in render_comparison(other)


def test_the_protocol_of_a_perplexity_is_stored_and_shown_with_its_interval(results, rng):
    found = measured(results, rng, 0.02)
    protocol = found.perplexity.protocol
    assert (protocol.windows, protocol.window, protocol.stride, protocol.scored) == (32, 512, 512, 511)
    low, high = found.perplexity.ratio_interval
    # The interval is of what was measured: one time in twenty it leaves out what the blocks were drawn around.
    forms = found.perplexity
    assert low < forms.onnx.value / forms.dense.value < high
    # Windows that look alike by chance are drawn together, which widens it.
    assert 0.4 < (high - low) / (2 * 1.96 * math.exp(0.12) * 0.002 / math.sqrt(32)) < 2.5
    text = render_markdown(found)
    assert "32 windows of 512 tokens, stride 512, no BOS" in text
    assert f"({number(low)}–{number(high)})" in text
    assert "(1–1)" not in text  # dense beside itself


def test_changed_answers_are_shown_both_ways(results):
    task = replace(
        results.tasks["copa"], lost=0.04, gained=0.01, kappa=0.81, difference=-0.03, difference_interval=(-0.06, 0.01)
    )
    text = render_markdown(results.model_copy(update={"tasks": {"copa": task}}))
    assert "4.00 %, 1.00 %" in text
    assert "(κ 0.81)" in text
    assert "-0.03 (-0.06 to 0.01)" in text


def test_what_was_forgotten_is_told_by_kind_of_token_by_text_and_by_prediction(results):
    found = results.forgetting
    text = render_markdown(results)
    rare = found.frequency[0]
    assert f"{rare.dense:.3f} | {rare.compressed:.3f} | {rare.added:+.3f} (" in text
    assert f"| code | 96 | {number(found.domains['code'].dense)} |" in text
    assert f"lost {percent(found.lost)}, gained {percent(found.gained)}" in text
    assert "| 0.00 % | 94.12 % | +94.12 points |" in text  # the same token again and again: 16 of 17 repeat
    picture = next(plot for plot in plots.draw_plots(results)[0] if plot.title == "Where the loss grew")
    assert f"{rare.added:.3g} nats on the rarest" in picture.text


def test_what_only_one_result_has_has_no_recovery(results):
    comparison = compare_results(results, results.model_copy(update={"tasks": {}}))
    lost = next(d for d in comparison.figures if d.name == "tasks.copa.recovery")
    assert (lost.one, lost.two, lost.recovery) == (0.96, None, None)


def test_numbers_for_people():
    assert [number(x) for x in (None, 5, 123456, 0.123456, 98765.4, math.nan)] == [
        "n/a", "5", "123,456", "0.1235", "98,765", "nan",
    ]  # fmt: skip
    assert [human_bytes(x) for x in (12, 1500, 453_200_000)] == ["12 B", "1.5 kB", "453.2 MB"]
    assert [percent(x) for x in (1.0, 0.99999, 0.5)] == ["100 %", "99.99 %", "50.00 %"]


def test_reading_results_needs_neither_torch_nor_onnxruntime():
    imports = "import sys, soco_export.report.compare, soco_export.report.junit, soco_export.report.pages.html"
    code = f"{imports}; sys.exit(bool({{'torch', 'onnxruntime'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
