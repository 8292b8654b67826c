"""What became worse than a baseline is found, on its side; what is noise is not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from soco_export.bench.stats import Ratio
from soco_export.files.records import record_file
from soco_export.recipe.load import load_recipe
from soco_export.report.baseline import changes, judge_against, parse_tolerances
from soco_export.report.compare import compare_results
from soco_export.report.schema import RESULTS_FILE, Results, schema_text
from soco_export.run.against import gate_run
from soco_export.run.folder.manifest import Manifest, Process
from soco_export.run.folder.results import load_results
from soco_train.errors import DataError, RecipeError
from tests.export.report.test_report import results, rng  # noqa: F401

SCHEMA = Path(__file__).parents[3] / "docs" / "results.schema.json"
DECODE = "latency.workloads.decode_128.speedup.value"


def timed(one: Results, *ends: float) -> Results:
    work = replace(one.latency.workloads["decode_128"], speedup=Ratio(*ends, 30))
    return one.model_copy(update={"latency": replace(one.latency, workloads={"decode_128": work})})


def states(run: Results, baseline: Results, **tolerances: float) -> dict[str, str]:
    verdicts = judge_against(run, baseline, {name.replace("__", "."): value for name, value in tolerances.items()})
    return {verdict.name: verdict.state for verdict in verdicts}


def worse(one: Results, section: str, **fields: object) -> Results:
    return one.model_copy(update={section: getattr(one, section).model_copy(update=fields)})


def test_a_run_is_no_worse_than_itself(results):  # noqa: F811
    found = states(results, results)
    assert {"perplexity.ratio", "sizes.bytes.onnx", "tasks.copa.recovery", DECODE} <= found.keys()
    assert "failed" not in found.values()
    assert changes(results, results) == []


@pytest.mark.parametrize(("factor", "state"), [(1.05, "failed"), (1.01, "passed"), (0.5, "passed")])
def test_a_worse_perplexity_fails_and_a_better_one_does_not(results, factor, state):  # noqa: F811
    changed = worse(results, "perplexity", ratio=factor * results.perplexity.ratio)
    assert states(changed, results)["perplexity.ratio"] == state
    assert states(changed, results, perplexity__ratio=0.1)["perplexity.ratio"] == "passed"


def test_a_larger_file_and_a_lower_accuracy_fail(results):  # noqa: F811
    larger = worse(results, "sizes", bytes={"onnx": int(1.1 * results.sizes.bytes["onnx"])})
    assert states(larger, results)["sizes.bytes.onnx"] == "failed"
    assert states(results, larger)["sizes.bytes.onnx"] == "passed"
    task = replace(results.tasks["copa"], recovery=0.9)
    assert states(results.model_copy(update={"tasks": {"copa": task}}), results)["tasks.copa.recovery"] == "failed"


@pytest.mark.parametrize(
    ("ends", "state"),
    [((0.6, 0.58, 0.62), "failed"), ((1.3, 0.4, 2.0), "inconclusive"), ((1.4, 1.35, 1.45), "passed")],
)
def test_speed_is_judged_by_both_intervals(results, ends, state):  # noqa: F811
    before = timed(results, 1.3, 1.28, 1.32)
    assert states(timed(results, *ends), before)[DECODE] == state
    unsure = timed(results, 1.3, 0.5, 2.5)  # of such a baseline nobody can be said to be slower
    assert states(timed(results, *ends), unsure)[DECODE] == "inconclusive"
    assert DECODE in states(timed(results, *ends), timed(results, 1e308, 1e-308, 1e308))  # no time, and a float


def test_what_was_not_measured_or_on_another_text_fails(results):  # noqa: F811
    assert states(results.model_copy(update={"tasks": {}}), results)["tasks.copa.recovery"] == "failed"
    other = worse(results, "perplexity", fingerprint="cd" * 32)
    assert states(other, results)["perplexity.text"] == "failed"
    assert states(results.model_copy(update={"latency": None}), results)[DECODE] == "failed"


@pytest.mark.parametrize("changed", [{"threads": 1}, {"provider": "CUDAExecutionProvider"}])
def test_speed_on_other_threads_or_another_provider_is_no_comparison(results, changed):  # noqa: F811
    other = results.model_copy(update={"latency": replace(results.latency, **changed)})
    assert states(other, results)["latency.conditions"] == "failed"
    assert "latency.conditions" not in states(results, results)


@pytest.mark.parametrize(("nodes", "state"), [(800, "failed"), (430, "passed"), (300, "passed")])
def test_a_graph_that_is_fused_less_is_found_though_dense_is_as_slow(results, nodes, state):  # noqa: F811
    other = results.model_copy(update={"placement": {"CPUExecutionProvider": {"MatMul": 300, "Mul": nodes - 300}}})
    assert states(other, results)["graph.nodes"] == state


def test_what_changed_is_said(results):  # noqa: F811
    machine = replace(results.machine, threads=1, versions={"python": "3.12.0", "torch": "3"})
    run = results.model_copy(update={"machine": machine, "recipe": {**results.recipe, "keep_params": 0.6}})
    assert changes(run, results) == [
        "threads: 2 → 1",
        "version of python: 3.11.1 → 3.12.0",
        "version of torch: none → 3",
        "recipe keep_params: 0.8 → 0.6",
    ]


def test_tolerances_are_read_and_refused():
    assert parse_tolerances(["perplexity.ratio=0.03"]) == {"perplexity.ratio": 0.03}
    for text in ("perplexity.ratio", "perplexity.ratio=x", "perplexity.ratio=-1"):
        with pytest.raises(RecipeError, match="no tolerance"):
            parse_tolerances([text])


def test_a_tolerance_of_nothing_is_refused(results):  # noqa: F811
    with pytest.raises(RecipeError, match=r"perplexity\.ratoi"):
        judge_against(results, results, {"perplexity.ratoi": 0.1})


def test_a_tolerance_beside_no_baseline_is_refused(run):
    with pytest.raises(RecipeError, match="there is none"):
        gate_run(run, None, ["perplexity.ratio=0.03"])


@pytest.fixture
def run(results, tmp_path):  # noqa: F811
    (tmp_path / "run").mkdir()
    recipe = load_recipe("tiny").replace({"gates": {"max_bytes_ratio": 0.9}})
    results = results.model_copy(update={"recipe": recipe.as_values()}).judged(recipe.gates)
    results.save(tmp_path / "run" / RESULTS_FILE)
    manifest = Manifest(
        model="m", argv=[], seed=0, versions={}, process=Process(pid=1, host="h", started="now"),
        written={RESULTS_FILE: record_file(tmp_path / "run" / RESULTS_FILE)},
    )  # fmt: skip
    manifest.save(tmp_path / "run")
    return tmp_path / "run"


def test_the_verb_has_the_exit_code_of_what_it_found(run, results, tmp_path):  # noqa: F811
    better = tmp_path / "baseline.json"
    worse(results, "perplexity", ratio=0.8 * results.perplexity.ratio).save(better)
    assert int(gate_run(run, None, None).code) == 0
    assert int(gate_run(run, run, None).code) == 0
    found = gate_run(run, better, None)
    assert int(found.code) == 3
    assert "perplexity.ratio" in found.text
    assert not found.document["passed"]
    assert int(gate_run(run, better, ["perplexity.ratio=0.5"]).code) == 0


@pytest.mark.parametrize(
    "edit",
    [
        lambda found: found["sizes"].update(bytes_ratio=0.95),
        lambda found: found["sizes"].update(bytes_ratio=0.7),
        lambda found: found["recipe"]["gates"].update(max_bytes_ratio=0.5),
        lambda found: found["recipe"]["gates"].update(max_ppl_ratio=9.0),
        lambda found: found["verdicts"][0].update(threshold=0.99),
        lambda found: found["verdicts"][0].update(passed=False),
        lambda found: found["verdicts"].clear(),
        lambda found: found.update(recipe={}),
    ],
)
def test_a_copy_whose_verdicts_are_not_those_of_its_figures_is_refused(run, tmp_path, edit):
    copy = tmp_path / "copy.json"
    document = json.loads((run / RESULTS_FILE).read_text(encoding="utf-8"))
    copy.write_text(json.dumps(document), encoding="utf-8")
    assert int(gate_run(copy, None, None).code) == 0
    edit(document)
    copy.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=r"max_bytes_ratio|max_ppl_ratio|no recipe"):
        gate_run(copy, None, None)


def test_what_another_version_set_elsewhere_does_not_keep_it_from_being_judged(run, tmp_path):
    copy = tmp_path / "copy.json"
    document = json.loads((run / RESULTS_FILE).read_text(encoding="utf-8"))
    for section in ("train", "refine", "bench"):
        document["recipe"].setdefault(section, {})["of_another_version"] = 1
    copy.write_text(json.dumps(document), encoding="utf-8")
    assert int(gate_run(copy, None, None).code) == 0


def test_results_that_were_edited_are_refused(run):
    path = run / RESULTS_FILE
    assert load_results(run).model.name == "smol"
    document = json.loads(path.read_text(encoding="utf-8"))
    document["perplexity"]["ratio"] = 1.0
    path.write_text(json.dumps(document), encoding="utf-8")
    for given in (run, path):
        with pytest.raises(RecipeError, match=r"results\.json \(changed since it was written\)"):
            load_results(given)
    copy = run.parent / "committed.json"
    copy.write_bytes(path.read_bytes())
    assert load_results(copy).perplexity.ratio == 1.0


def test_a_run_that_is_not_done_is_called_that(run):
    (run / RESULTS_FILE).unlink()
    with pytest.raises(RecipeError, match="has no results yet") as refused:
        load_results(run)
    assert "goes on" in refused.value.fix


def test_another_schema_is_refused_with_its_version(run):
    path = run.parent / "later.json"
    path.write_text('{"schema_version": 7, "unknown": 1}', encoding="utf-8")
    with pytest.raises(DataError, match="version 7"):
        Results.load(path)


def test_a_number_beyond_what_a_float_counts_is_refused(results, tmp_path):  # noqa: F811
    document = json.loads(results.model_dump_json())
    document["placement"]["CPUExecutionProvider"] = {"Gemm": -(10**400)}
    (tmp_path / "edited.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(DataError, match=r"2\^53"):
        Results.load(tmp_path / "edited.json")


def test_the_published_schema_is_current():
    assert SCHEMA.read_text(encoding="utf-8") == schema_text(), (
        "python -m soco_export.report.schema > docs/results.schema.json"
    )


def test_compare_says_what_is_beyond_noise(results):  # noqa: F811
    base = timed(results, 1.3, 1.25, 1.35)
    found = {}
    for name, ends in (("noise", (1.33, 1.28, 1.38)), ("beyond", (1.6, 1.55, 1.65))):
        found[name] = {d.name: d for d in compare_results(base, timed(results, *ends)).figures}[DECODE]
    assert (found["noise"].beyond_noise, found["beyond"].beyond_noise) == (False, True)
    figures = {d.name: d.beyond_noise for d in compare_results(results, results).figures}
    assert figures["sizes.bytes_ratio"] is False
    assert figures["tasks.copa.compressed.acc"] is False
    assert figures["perplexity.ratio"] is None
