"""Figures of a run find what was planted: each from the model, the folder and the text that it names."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from soco_export.bench import runner
from soco_export.bench.figures import LatencyFigures
from soco_export.bench.settings import BenchSettings
from soco_export.bench.stats import Ratio, summarise
from soco_export.evaluate.figures import PerplexityFigures
from soco_export.evaluate.tasks import TaskAnswers, compare_answers
from soco_export.report.rendering import speedup
from soco_export.run.stages import evidence, report
from soco_export.runtimes import open as opening
from soco_train.settings.data import DataSettings
from soco_train.store.importances import Importances


class Run:
    """A finished run of which only the folders' names matter."""

    format = "onnx"
    recipe = SimpleNamespace(
        bench=BenchSettings(memory=True),
        validation=SimpleNamespace(provider="CPU", threads=1),
        model=SimpleNamespace(trust_remote_code=False),
        name="planted",
    )
    notify = None

    def __init__(self, root=Path("run")):
        self.root = root

    def path(self, _, name):
        return self.root / name

    def blocks(self, _):
        return SimpleNamespace(source="text", fingerprint="ab", tokens=SimpleNamespace(shape=(2, 8)))


def test_each_form_is_opened_from_its_own_folder(monkeypatch):
    monkeypatch.setattr(opening, "open_decoder", lambda folder, settings, name, trusted=False: folder.name)
    openers = evidence._openers(Run())
    assert [openers[form]() for form in ("low-rank", "shipped")] == ["hf", "onnx"]


def test_dense_is_timed_against_what_ships(monkeypatch, tmp_path):
    timed = []

    def latency(dense, compressed, *_):
        timed.append((dense.name, compressed.name))
        return LatencyFigures("CPU", 1, 2, {}, {}, {})

    monkeypatch.setattr(runner, "measure_latency", latency)
    monkeypatch.setattr(runner, "measure_memory", lambda dense, compressed, *_: latency(dense, compressed))
    evidence.bench_run(Run(), tmp_path)
    assert timed == [("onnx-dense", "onnx")] * 2


def test_perplexity_of_onnx_is_its_own():
    forms = {name: {"value": value, "loss": 1.0, "tokens": 9} for name, value in
             (("dense", 10.0), ("low-rank", 12.0), ("shipped", 15.0))}  # fmt: skip
    run = Run()
    run.recipe = SimpleNamespace(evaluation=DataSettings(builtin="speeches"))
    found = report._perplexity(run, forms)
    assert (found.dense.value, found.low_rank.value, found.onnx.value, found.ratio) == (10.0, 12.0, 15.0, 1.5)
    for form in forms.values():
        form |= {"blocks": [1.0, 2.0], "interval": [9.0, 11.0]}
    assert report._perplexity(run, forms).dense == PerplexityFigures(10.0, 1.0, 9, (1.0, 2.0), (9.0, 11.0))


def test_a_larger_file_makes_a_larger_ratio(monkeypatch, tmp_path):
    for name, size in (("hf", 10), ("onnx", 30), ("onnx-dense", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_bytes(bytes(size))
    (tmp_path / "plan.json").write_text("{}")
    plan = SimpleNamespace(
        params_before=8,
        params_after=4,
        layers={},
        dense_layers=(),
        keep_params=0.5,
        storage="stacked",
        bytes=None,
        dropped=0,
    )
    monkeypatch.setattr(report.RankPlan, "from_json", lambda text: plan)
    monkeypatch.setattr(Importances, "load", lambda path: Importances({}, {"parameters": 20}))
    monkeypatch.setattr(report, "_largest_coefficient", lambda path: None)
    monkeypatch.setattr(report, "cache_bytes", lambda path: len(path.name))
    sizes = report._sizes(Run(tmp_path))
    assert sizes.bytes == {"hf": 10, "onnx": 30, "onnx-dense": 60}
    assert sizes.bytes_ratio == 0.5
    assert sizes.cache_bytes == {"onnx": 4, "onnx-dense": 10}
    assert (sizes.params_before, sizes.params_after) == (20, 16)


@pytest.mark.parametrize(("low", "high", "told"), [(0.7, 0.95, True), (0.7, 1.2, False)])
def test_slower_is_said_where_the_interval_says_so(low, high, told):
    work = SimpleNamespace(speedup=Ratio(0.9, low, high, 30))
    results = SimpleNamespace(
        latency=SimpleNamespace(workloads={"decode_128": work}), recipe={"optimise_for": "params"}
    )
    assert bool(list(report.slower(results))) == told


@pytest.mark.parametrize(("low", "high", "bold"), [(0.9, 1.3, False), (1.01, 1.3, True), (0.5, 0.9, True)])
def test_nothing_is_bold_whose_interval_contains_1(low, high, bold):
    assert ("**" in speedup(Ratio((low * high) ** 0.5, low, high, 30))) == bold


def test_flips_are_answers_that_changed_sides():
    dense = TaskAnswers("t", (0, 1, 1, 0), (True, True, True, False), (True,) * 4)
    pruned = TaskAnswers("t", (0, 1, 0, 1), (True, True, False, False), (True,) * 4)
    found = compare_answers(dense, pruned)
    assert (found.flips, found.agreement, found.recovery) == (0.25, 0.5, pytest.approx(2 / 3))
    assert summarise([1.0, 2.0]).p50 == 1.5
