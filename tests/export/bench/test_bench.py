import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from soco_export.bench import runner
from soco_export.bench.machine import describe_machine
from soco_export.bench.memory import high_water_mark, measure_peak_memory
from soco_export.bench.roofline import bytes_per_decode_step, measure_bandwidth, roofline
from soco_export.bench.runner import (
    Workload,
    interleave,
    measure_latency,
    measure_memory,
    memory_prompt,
    plan_workloads,
    prepare,
)
from soco_export.bench.settings import BenchSettings
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_train.errors import DataError, MachineError
from tests.support.graphs import CONTEXT, HEADS, VOCABULARY, WIDTH, ToyModel, save_toy


def folder_with_config(tmp_path, name, seed):
    folder = save_toy(ToyModel(seed), tmp_path / name)
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_rounds_are_strictly_interleaved_and_swap_who_goes_first():
    calls = []
    dense, compressed = interleave(
        (lambda: calls.append("d"), lambda: calls.append("c")), rounds=3, warmup=1, samples=2
    )
    assert "".join(calls) == "ddcc" + "ccdd" + "ccdd" + "ddcc"
    assert [len(samples) for samples in dense] == [len(samples) for samples in compressed] == [2, 2, 2]


def test_workloads_beyond_the_context_are_skipped_with_the_reason():
    settings = BenchSettings(prefill=(16, 512), past=100)
    fitting, skipped = plan_workloads(settings, 64)
    assert fitting == [Workload(16, 0)]
    assert skipped == dict.fromkeys(("prefill_512", "decode_100"), "the model's context ends at 64 tokens")
    assert [w.name for w in plan_workloads(settings, None)[0]] == ["prefill_16", "prefill_512", "decode_100"]


def test_latency_of_two_folders(tmp_path):
    folders = [folder_with_config(tmp_path, name, seed) for seed, name in enumerate(("dense", "low-rank"))]
    settings = BenchSettings(rounds=5, seconds=0, prefill=(8, 128), past=16, decode_samples=2, roofline=False)
    events = []
    figures = measure_latency(*folders, settings, "CPUExecutionProvider", 1, events.append)
    assert set(figures.workloads) == {"prefill_8", "decode_16"}
    assert set(figures.skipped) == {"prefill_128"}
    decode = figures.workloads["decode_16"]
    assert (decode.dense.n, decode.compressed.n, decode.speedup.rounds) == (10, 10, 5)
    assert decode.dense.p95 is None
    assert decode.dense_tokens_per_s == pytest.approx(1e3 / decode.dense.p50)
    prefill = figures.workloads["prefill_8"]
    assert prefill.compressed_tokens_per_s == pytest.approx(8e3 / prefill.compressed.p50)
    assert prefill.speedup.low <= prefill.speedup.value <= prefill.speedup.high
    assert [event.step for event in events] == [1, 2]


class Clock:
    """A clock that moves only when it is told to, so that no other work of the machine shows in it."""

    now = 0.0

    def perf_counter(self):
        return self.now

    def passes(self, seconds):
        self.now += seconds


@pytest.fixture
def clock(monkeypatch):
    """Return the clock that passes are timed by."""
    clock = Clock()
    monkeypatch.setattr(runner, "time", clock)
    return clock


@pytest.mark.parametrize("size", [0, None, [12]])
def test_a_model_of_no_tokens_is_not_timed(tmp_path, size):
    folder = folder_with_config(tmp_path, "model", 1)
    (folder / "config.json").write_text(json.dumps({"vocab_size": size}), encoding="utf-8")
    with pytest.raises(DataError, match=re.escape(f"vocab_size to {size}")):
        measure_latency(folder, folder, BenchSettings(), "CPUExecutionProvider", 1)


@pytest.mark.parametrize(("name", "side"), [("dense", 1), ("low-rank", -1)])
def test_a_session_that_is_made_slower_is_found_so_on_its_side(tmp_path, monkeypatch, clock, name, side):
    """Every pass takes a millisecond, those of one folder 20 more."""
    repeatable = OnnxDecoder.repeatable

    def timed(self, ids):
        run, takes = repeatable(self, ids), 0.021 if self.name == name else 0.001
        return lambda: (clock.passes(takes), run())

    monkeypatch.setattr(OnnxDecoder, "repeatable", timed)
    folders = [folder_with_config(tmp_path, folder, 0) for folder in ("dense", "low-rank")]
    settings = BenchSettings(rounds=4, seconds=0, prefill=(8,), past=16, decode_samples=2, roofline=True, cold_starts=0)
    figures = measure_latency(*folders, settings, "CPUExecutionProvider", 1)
    for work in figures.workloads.values():
        slow, fast = (work.dense, work.compressed) if side > 0 else (work.compressed, work.dense)
        assert (slow.p50, fast.p50) == pytest.approx((21, 1))
        assert (work.speedup.low, work.speedup.value, work.speedup.high) == pytest.approx([21.0**side] * 3)
        assert (work.dense_tokens_per_s < work.compressed_tokens_per_s) == (side > 0)
        assert work.dense_tokens_per_s == pytest.approx(1e3 * work.tokens / work.dense.p50)
        assert work.control.value == pytest.approx(1)  # the same folder: as slow as the first one, or as fast
    decode = figures.workloads["decode_16"]
    assert figures.roofline["dense"].measured_ms == decode.dense.p50
    assert figures.roofline["compressed"].measured_ms == decode.compressed.p50


class Recorder:
    """A decoder that remembers how many tokens are in its cache, and how many are timed behind them."""

    past = 0
    timed = None

    def release(self):
        self.past = 0

    def prefill(self, ids):
        self.past = ids.shape[1]

    def repeatable(self, ids):
        self.timed = (self.past, ids.shape[1])


@pytest.mark.parametrize("workload", [Workload(8, 0), Workload(1, 16), Workload(3, 5)])
def test_a_prefill_is_timed_on_an_empty_cache_and_a_step_behind_its_own(workload):
    decoder = Recorder()
    decoder.past = 99  # of the workload before
    prepare(decoder, workload, np.zeros((1, workload.past + workload.tokens), dtype=np.int64))
    assert decoder.timed == (workload.past, workload.tokens)
    assert decoder.past == 0


def test_a_series_goes_on_for_its_seconds_and_a_turn_for_its_slice(clock):
    slow, fast = 0.3 * runner.SLICE, 0.06 * runner.SLICE
    runs = (lambda: clock.passes(slow), lambda: clock.passes(fast))
    first, second = interleave(runs, rounds=2, warmup=0, samples=1, seconds=10 * runner.SLICE)
    # the first pass that ends behind the slice is a turn's last, so a round takes 1.2 and 1.02 slices
    assert [len(turn) for turn in first] == [4] * 5
    assert [len(turn) for turn in second] == [17] * 5
    assert np.mean(first) == pytest.approx(1e3 * slow)


def test_nobody_always_follows_the_same_one():
    order = []
    runs = [lambda name=name: order.append(name) for name in "abc"]
    interleave(runs, rounds=12, warmup=0, samples=1)
    follows = {a: [y for x, y in itertools.pairwise(order) if x == a] for a in "abc"}
    assert all({b for b in "abc" if b != a} <= set(after) for a, after in follows.items())


def test_cold_starts_are_of_each_model_and_optional(tmp_path):
    folders = [folder_with_config(tmp_path, name, 0) for name in ("dense", "low-rank")]
    settings = {"rounds": 2, "seconds": 0, "prefill": (8,), "past": 16, "roofline": False, "control": False}
    figures = measure_latency(*folders, BenchSettings(**settings, cold_starts=2), "CPUExecutionProvider", 1)
    assert set(figures.cold_start) == {"dense", "compressed"}
    for cold in figures.cold_start.values():
        assert (cold.openings, cold.tokens) == (2, 8)
        assert min(cold.first_token_ms, cold.load_ms) > 0
    assert figures.workloads["decode_16"].control is None
    assert figures.placement["dense"] == figures.placement["compressed"]
    assert set(figures.placement["dense"]) == {"CPUExecutionProvider"}
    assert json.loads(json.dumps(asdict(figures)))["placement"] == figures.placement
    none = measure_latency(*folders, BenchSettings(**settings, cold_starts=0), "CPUExecutionProvider", 1)
    assert none.cold_start == {}


def test_one_length_of_the_cache_or_several():
    assert BenchSettings(past=16).past == (16,)
    assert BenchSettings(past=[16, 2048]).past == (16, 2048)
    with pytest.raises(ValueError, match="past"):
        BenchSettings(past=[])


def test_a_decode_step_reads_weights_and_cache_but_not_lookup_tables(tmp_path):
    model = save_toy(ToyModel(0), tmp_path) / "model.onnx"
    graph = onnx.load(str(model), load_external_data=False).graph
    constants = sum(numpy_helper.to_array(t).nbytes for t in graph.initializer if t.name not in "EPW")
    head, cache = 4 * WIDTH * VOCABULARY, 2 * 4 * WIDTH
    assert bytes_per_decode_step(model, 10) == constants + head + 10 * cache
    assert HEADS * (WIDTH // HEADS) == WIDTH


@pytest.mark.parametrize(("kind", "size"), [(TensorProto.FLOAT, 24), (TensorProto.FLOAT16, 12), (TensorProto.INT4, 3)])
def test_a_table_that_a_product_reads_too_counts_in_its_own_type(tmp_path, kind, size):
    weight = helper.make_tensor("W", kind, [2, 3], bytes(size), raw=True)
    nodes = [helper.make_node("Gather", ["W", "i"], ["x"]), helper.make_node("MatMul", ["x", "W"], ["y"])]
    graph = helper.make_graph(nodes, "tied", [], [], [weight])
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert bytes_per_decode_step(tmp_path / "model.onnx", 5) == size
    del graph.node[1]
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert bytes_per_decode_step(tmp_path / "model.onnx", 5) == 0


@pytest.mark.parametrize("op", ["RotaryEmbedding", "GroupQueryAttention"])
def test_of_the_cosines_of_all_positions_a_step_reads_one_row(tmp_path, op):
    table = helper.make_tensor("cos", TensorProto.FLOAT, [8192, 32], bytes(8192 * 32 * 4), raw=True)
    graph = helper.make_graph([helper.make_node(op, ["x", "cos"], ["y"])], "rope", [], [], [table])
    onnx.save(helper.make_model(graph), str(tmp_path / "model.onnx"))
    assert bytes_per_decode_step(tmp_path / "model.onnx", 5) == 0


def test_roofline_is_bytes_over_bandwidth_over_time():
    found = roofline(bytes_per_step=200_000_000, bandwidth=20e9, measured_ms=12.5)
    assert found.ideal_ms == pytest.approx(10)
    assert found.efficiency == pytest.approx(0.8)


def test_bandwidth_is_of_this_world():
    assert 1e8 < measure_bandwidth(threads=1) < 1e13


def test_peak_memory_is_of_the_model_and_not_of_the_parent(tmp_path, monkeypatch):
    folder = folder_with_config(tmp_path, "toy", 0)
    (folder / "numpy.py").write_text("raise SystemExit('code that came with the model')")
    monkeypatch.chdir(folder)
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "torch.py").write_text("raise SystemExit('what a server would not import')")
    places = filter(None, (str(tmp_path / "first"), os.environ.get("PYTHONPATH")))  # an empty one is the working folder
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(places))
    ballast = np.ones(600 * 2**20, dtype=np.uint8)
    found = measure_peak_memory(folder, "CPUExecutionProvider", 1, 8)
    assert high_water_mark() > ballast.nbytes
    assert 20 * 2**20 < found.interpreter <= found.peak < 600 * 2**20
    assert "alone" in found.method


def test_peak_memory_is_measured_on_what_fits_the_context(tmp_path):
    settings = BenchSettings(prefill=(512, CONTEXT, 16), past=1)
    assert memory_prompt(settings, None) == 512
    assert memory_prompt(settings, CONTEXT + 1) == CONTEXT
    assert memory_prompt(settings, CONTEXT) == 16  # a decode step follows
    assert memory_prompt(settings, 12) == 11
    folders = [folder_with_config(tmp_path, name, seed) for seed, name in enumerate(("dense", "low-rank"))]
    found = measure_memory(*folders, settings, "CPUExecutionProvider", 1)
    assert found.ratio == found.compressed.peak / found.dense.peak


def test_a_measuring_process_that_fails_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(MachineError, match="could not be measured"):
        measure_peak_memory(tmp_path, "CPUExecutionProvider", 1, 8)

    def forever(command, **_):
        raise subprocess.TimeoutExpired(command, 1)

    monkeypatch.setattr(subprocess, "run", forever)
    with pytest.raises(MachineError, match="took more than"):
        measure_peak_memory(tmp_path, "CPUExecutionProvider", 1, 8)


def test_the_machine_is_named():
    machine = describe_machine(threads=2)
    assert machine.threads == 2
    assert machine.cores >= 1
    assert machine.cpu
    assert {"python", "torch", "onnxruntime"} <= machine.versions.keys()
