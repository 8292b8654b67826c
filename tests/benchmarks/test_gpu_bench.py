"""benchmarks.gpu on a CPU: the box of time, what is kept and done again, each section at tiny sizes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from benchmarks.gpu import language, run, runtime, shapes, tests
from benchmarks.gpu.box import TimeBox, shares
from benchmarks.gpu.calibration import prompts, sampled
from benchmarks.gpu.choices import SMALL, Choice, closed_forms, further, trained
from benchmarks.gpu.dense import train_dense
from benchmarks.gpu.document import DONE, TIME, Document
from benchmarks.gpu.laboratory import as_int4, perplexity
from benchmarks.gpu.options import Options, parse
from benchmarks.gpu.sections import SECTIONS, Section, Skipped
from benchmarks.gpu.source import ROOT
from benchmarks.gpu.tests import read_report
from benchmarks.gpu.torch_models import last_logits
from benchmarks.quality.cells import method_file
from benchmarks.scale.parts import Size, TimeUp, random_factors
from benchmarks.speed import series
from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.recipe.load import load_recipe
from soco_train.events import Event, silent
from soco_train.installed import version_of
from soco_train.numbers.rounding import rounded
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from soco_train.settings.rounding import RoundingSettings
from tests.support.models import make_model


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def options(tmp_path: Path, *words: str) -> Options:
    return parse(["--small", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), *words])


class Stub:
    """A section of three pieces; it counts what it measures."""

    def __init__(self, clock: Clock | None = None, broken: bool = False) -> None:
        self.done: list[str] = []
        self.clock, self.broken, self.reports = clock, broken, True

    def parts(self, given: Options) -> list[str]:
        return ["first", "second"]

    def pieces(self, given: Options, part: str, box: TimeBox) -> Iterator[tuple[str, Any]]:
        for name in ("one", "two") if part == "first" else ("three",):
            yield name, lambda name=name: self.measure(name, box)

    def measure(self, name: str, box: TimeBox) -> dict[str, Any]:
        if self.broken and name == "one":
            raise RuntimeError("out of memory\nand more")
        self.done.append(name)
        if self.clock is not None:
            self.clock.now += 10
            if self.reports:
                box(Event("step", 1, 1))
        return {"name": name}

    def row(self, figures: Any) -> str:
        return str(figures["name"])


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    found = Stub()
    monkeypatch.setattr(Section, "_module", lambda section: found)
    return found


def read(given: Options, letter: str = "a") -> Any:
    return json.loads((given.out / f"{letter}.json").read_text())


def test_a_section_that_is_done_is_not_done_again_unless_asked(stub: Stub, tmp_path: Path, capsys: Any) -> None:
    given = options(tmp_path, "--sections", "a")
    run.run(given)
    assert stub.done == ["one", "two", "three"]
    found = read(given)
    assert found["ended"] == {"first": DONE, "second": DONE}
    assert found["header"]["device"] == "cpu"
    assert found["header"]["versions"]["torch"] == torch.__version__
    assert found["header"]["commit"] or not (ROOT / ".git").exists()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("a: ")
    assert len(lines) == 1 + 1 + 3, "a line for the section, and the table"
    run.run(given)
    assert len(stub.done) == 3
    run.run(replace(given, fresh=True))
    assert len(stub.done) == 6


def test_another_setting_begins_anew(stub: Stub, tmp_path: Path) -> None:
    given = options(tmp_path, "--sections", "b")
    run.run(given)
    run.run(replace(given, tokens=given.tokens * 2))
    assert len(stub.done) == 6
    run.run(replace(given, tokens=given.tokens * 2, threads=7))
    assert len(stub.done) == 6, "which b does not depend on"


def test_what_failed_is_done_again_and_stops_nothing(stub: Stub, tmp_path: Path) -> None:
    given = options(tmp_path, "--sections", "a")
    stub.broken = True
    run.run(given)
    assert stub.done == ["two", "three"]
    found = read(given)
    assert found["pieces"]["one"]["error"] == "RuntimeError: out of memory"
    assert found["ended"]["first"].startswith("failed: one")
    stub.broken = False
    run.run(given)
    assert stub.done == ["two", "three", "one"]
    assert read(given)["ended"] == {"first": DONE, "second": DONE}


def test_time_that_is_over_ends_a_section_between_two_steps(stub: Stub, tmp_path: Path, monkeypatch: Any) -> None:
    clock = Clock()
    monkeypatch.setattr(run, "TimeBox", lambda seconds: TimeBox(seconds, clock))
    given = options(tmp_path, "--sections", "ab", "--minutes", "1.5")  # 15 s for a, 75 for b
    stub.clock = clock
    run.run(given)
    assert read(given)["ended"] == {"first": TIME, "second": TIME}
    assert list(read(given)["pieces"]) == ["one"], "the second piece was cut at its step, and is not there"
    assert read(given, "b")["ended"] == {"first": DONE, "second": DONE}
    assert len(stub.done) == 2 + 3
    run.run(given)
    assert list(read(given)["pieces"]) == ["one", "two"], "the same command goes on"


def test_no_piece_begins_after_the_time_is_over(stub: Stub, tmp_path: Path, monkeypatch: Any) -> None:
    stub.clock, stub.reports = Clock(), False
    monkeypatch.setattr(run, "TimeBox", lambda seconds: TimeBox(seconds, stub.clock))
    given = options(tmp_path, "--sections", "a", "--minutes", "0.1")
    run.run(given)
    assert stub.done == ["one"]
    assert read(given)["ended"] == {"first": TIME, "second": TIME}


def test_a_piece_that_was_cut_short_is_kept_and_done_again(tmp_path: Path) -> None:
    document = Document.open(tmp_path / "c.json", "key", {})
    document.add("train", {"step_seconds": [1.0], "short": True})
    document.add("cut", {"seconds": 1})
    again = Document.open(tmp_path / "c.json", "key", {})
    assert [again.settled(name) for name in ("train", "cut", "other")] == [False, True, False]
    assert again.pieces["train"]["step_seconds"] == [1.0]
    assert not Document.open(tmp_path / "c.json", "another", {}).pieces
    assert not Document.open(tmp_path / "c.json", "key", {}, fresh=True).pieces


def test_what_this_machine_has_nothing_for_says_why(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("it has a GPU")
    given = replace(options(tmp_path), small=False)
    with pytest.raises(Skipped, match="no CUDA device"):
        next(runtime.pieces(given, "fp32", TimeBox(1)))
    run.run(replace(given, sections="d"))
    assert all("no CUDA device" in how for how in read(given, "d")["ended"].values())


@given(st.floats(0.1, 60), st.lists(st.floats(0.5, 9), min_size=1, max_size=5))
def test_shares_are_the_whole_time(minutes: float, weights: list[float]) -> None:
    assert sum(shares(minutes, weights)) == pytest.approx(60 * minutes)


def test_a_process_does_a_part_and_one_that_hangs_is_ended(tmp_path: Path, monkeypatch: Any) -> None:
    words = ["--small", "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--sections", "c"]
    given = parse([*words, "--shapes", "small"])
    section = next(section for section in SECTIONS if section.letter == "c")
    run.start([*words, "--shapes", "small"], section, given, "distil small", 600)
    figures = read(given, "c")["pieces"]["distil small"]
    # nothing but the base is large here: what the interpreter and the libraries take is right, or this fails
    assert runtime.CUDA or 0.8 < figures["taken_over_predicted"] < 1.2
    assert figures["tokens_per_second"] > 0
    monkeypatch.setattr(run, "GRACE", 0.0)
    run.start([*words, "--shapes", "small"], section, given, "cut small", 0.2)
    assert read(given, "c")["ended"]["cut small"].startswith(TIME)


def test_junit_xml_is_read_and_no_test_at_all_is_an_error() -> None:
    good, bad = '<testcase name="a" time="2"/>', '<testcase name="b"><failure message="assert 1&#10;more"/></testcase>'
    skipped = '<testcase name="c"><skipped/></testcase>'
    assert read_report(f"<r>{good}{skipped}</r>")["passed"] == 1
    found = read_report(f"<r>{good}{bad}{skipped}</r>")
    assert (found["passed"], found["skipped"], found["failures"]) == (1, 1, {"b": "assert 1"})
    assert found["error"] == "1 failed: b"
    assert read_report(f"<r>{skipped}</r>")["error"] == "no test was run"


def test_pytest_is_run_and_ends_when_its_time_is_over(monkeypatch: Any) -> None:
    monkeypatch.setattr(tests, "ASKED", ["tests/train/test_devices.py", "-k", "rounds"])
    found = tests.run_tests(TimeBox(600))
    assert (found["passed"] + found["skipped"], found["failures"]) == (8, {})
    assert found["passed"] >= 4
    with pytest.raises(TimeUp):
        tests.run_tests(TimeBox(0.01))


# b


def test_every_choice_names_a_method_and_another_piece() -> None:
    found = [choice for keep in (0.6, 0.4) for kind in (closed_forms, trained, further) for choice in kind(keep)]
    assert len({choice.title for choice in found}) == len(found)
    for choice in found:
        load_recipe("tiny", list(choice.settings), overlay=method_file(choice.method))


def test_the_sampled_text_is_the_models_own_and_made_once(tmp_path: Path, monkeypatch: Any) -> None:
    """Drawn from a model that is sure of what follows: each token's successor."""
    model = make_model("llama-tied")
    carried = torch.arange(64).view(4, 16)
    effort = replace(SMALL, sampled=(2, 3), block=16, prompt=4)
    first = sampled(model, carried, effort, tmp_path, TimeBox(60))
    assert first.shape == (6, 16)
    assert first.dtype == torch.int64
    starts = [prompts(carried, 3, 4, seed) for seed in range(2)]
    assert torch.equal(first[:, :4], torch.cat(starts))
    likelihood = model(first).logits[:, 3:-1].log_softmax(-1).gather(-1, first[:, 4:, None])
    uniform = torch.randint(259, first[:, 4:, None].shape)
    others = model(first).logits[:, 3:-1].log_softmax(-1).gather(-1, uniform)
    assert float(likelihood.mean().detach()) > float(others.mean().detach())
    monkeypatch.setattr("benchmarks.gpu.calibration.sample", None)
    assert torch.equal(sampled(model, carried, effort, tmp_path, TimeBox(0)), first), "from the files, in no time"
    with pytest.raises(TimeUp):
        sampled(model, carried + 1, effort, tmp_path, TimeBox(0))


def test_perplexity_on_the_device_is_the_products(monkeypatch: Any) -> None:
    model, tokens = make_model("llama-tied"), torch.randint(250, (5, 12))
    monkeypatch.setattr("benchmarks.gpu.laboratory.AT_ONCE", 24)
    found = perplexity(model, tokens, silent)
    expected = measure_perplexity(TorchDecoder(model), tokens)
    assert (found.tokens, found.loss) == (expected.tokens, pytest.approx(expected.loss, rel=1e-5))


def test_int4_weights_are_those_of_the_export_and_only_within_the_context() -> None:
    model = make_model("llama-tied")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with as_int4(model):
        for name, value in model.state_dict().items():
            layer = value.ndim == 2 and ".layers." in name
            expected = rounded(before[name], RoundingSettings(weights="int4")) if layer else before[name]
            assert torch.equal(value, expected), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_dense_control_learns_the_text_and_gives_the_weights_back() -> None:
    model = make_model("llama-tied").requires_grad_(False)
    tokens = torch.arange(16).repeat(8, 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    settings = DistillSettings(steps=6, batch_tokens=64)

    def loss() -> float:
        logits = model(tokens).logits[:, :-1]
        return float(functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))

    untrained = loss()
    with train_dense(model, LayerSettings(), tokens, settings, 0.02, silent):
        assert loss() < untrained
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_cells_are_measured_and_the_probe_is_heard(tmp_path: Path, monkeypatch: Any) -> None:
    def few(keep: float) -> Iterator[Choice]:
        yield Choice("two-sided-distilled", keep)

    for kind in ("closed_forms", "further"):
        monkeypatch.setattr(language, kind, lambda keep: iter(()))
    monkeypatch.setattr(language, "trained", few)
    text = tmp_path / "more.txt"
    text.write_text("We hold these truths to be self-evident. " * 40, encoding="utf-8")
    given = options(
        tmp_path, "--sections", "b", "--minutes", "30", "--tokens", "256", "--evaluate", f"more={text}:16:2"
    )
    run.run(given)
    pieces = read(given, "b")["pieces"]
    assert list(pieces) == [
        "sampled text",
        "dense",
        "0.6 learning rate",
        "0.6 two-sided-distilled",
        "dense, the same tokens",
    ]
    assert not [figures for figures in pieces.values() if "error" in figures]
    rates, cell = pieces["0.6 learning rate"], pieces["0.6 two-sided-distilled"]
    assert cell["rate"] == rates["best"] == float(min(rates["held_out"], key=rates["held_out"].__getitem__))
    assert cell["kept"] <= 0.6
    assert cell["training_tokens"] == 256
    names = [text + kind for kind in ("", " int4") for text in ("evaluation", "more", "held out")]
    for figures in (pieces["dense"], cell, pieces["dense, the same tokens"]):
        assert sorted(figures["perplexity"]) == sorted(names)
        assert all(math.isfinite(value) for value in figures["perplexity"].values())
    assert pieces["dense"]["perplexity"]["more"] != pieces["dense"]["perplexity"]["more int4"]


# c


def test_a_training_that_is_cut_short_keeps_its_steps() -> None:
    clock = Clock()

    class Ticking(TimeBox):
        def __call__(self, event: Event) -> None:
            clock.now += event.stage == "train"
            super().__call__(event)

    recipe = shapes.shaped("small")
    found = shapes._do("train", recipe, Size(2, 16, 2, 6, 0.8), Ticking(3.5, clock))
    assert found["short"]
    assert len(found["step_seconds"]) == 3, "four were made, the first warms up"


def test_flops_and_memory_are_of_what_was_done() -> None:
    recipe = shapes.shaped("small")
    found = shapes._do("distil", recipe, Size(2, 16, 2, 1, 0.8), TimeBox(600))
    assert "short" not in found
    selected = 2 * (2 * 64 * 64 + 2 * 64 * 16 + 3 * 64 * 224)
    assert found["rank_sum"] <= 0.8 * selected
    per_token = 2 * (selected + 512 * 64 + 3 * found["rank_sum"] + 2 * 512 * 64)
    assert found["model_flops"] == pytest.approx(found["tokens_per_second"] * per_token)
    assert found["flops"] > found["model_flops"], "the activations are computed twice"
    more = shapes.memory("distil", recipe, Size(2, 4096, 8, 1, 0.8), {"host_peak": 1.0, "gpu_taken": 1.0})
    assert more["predicted"] > found["predicted"], "more tokens a step take more"


def test_random_factors_share_one_pool() -> None:
    found = random_factors({"a": (6, 4, 2), "b": (3, 9, 3)})
    assert [tuple(found["b"].up.shape), tuple(found["b"].down.shape)] == [(3, 3), (3, 9)]
    assert {tensor.untyped_storage().data_ptr() for layer in found.values() for tensor in (layer.up, layer.down)} == {
        found["a"].up.untyped_storage().data_ptr()
    }


def test_all_of_a_models_shapes_are_measured(tmp_path: Path) -> None:
    given = options(tmp_path, "--sections", "c", "--shapes", "small", "--minutes", "30")
    run.run(given)
    found = read(given, "c")
    assert found["ended"] == {f"{part} small": DONE for part in ("decompose", "train", "distil", "cut")}
    pieces = found["pieces"]
    assert list(pieces)[:2] == ["machine", "decompose small q_proj"]
    assert list(pieces)[-3:] == ["train small", "distil small", "cut small, 2 layers"]
    assert not [figures for figures in pieces.values() if "error" in figures]
    rows = [SECTIONS[2].row(figures) for figures in pieces.values()]
    assert "predicted" in rows[-2]


# d


def test_onnx_runtime_and_pytorch_take_turns(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(series, "ROUNDS", (2, 2))
    monkeypatch.setattr(series, "WORKLOADS", (series.Workload(1, 128), series.Workload(16, 0)))
    monkeypatch.setattr(series, "SAMPLES", {"decode_128": 1, "prefill_16": 1})
    given = options(tmp_path)
    if runtime.CUDA:
        pytest.skip("the GPU's own series are no matter of seconds")
    section = next(section for section in SECTIONS if section.letter == "d")
    run.work(section, given, "fp32", 600)
    figures = read(given, "d")["pieces"]["fp32"]
    assert "error" not in figures
    forms = [f"{keep} {form}" for keep in ("0.8", "0.6") for form in ("stacked", "pivoted")]
    assert [entry["name"] for entry in figures["entries"]] == ["dense", *forms]
    assert all(entry["placement"].endswith("CPUExecutionProvider") for entry in figures["entries"])
    assert [entry["name"] for entry in figures["beside"]] == [
        "dense",
        *(f"{n}, PyTorch eager" for n in ["dense", *forms]),
    ]
    assert "dense" in section.row(figures)
    assert not (given.work / "runtime" / "fp32").exists(), "gigabytes at true sizes"


def test_a_pass_that_is_captured_asks_the_device_nothing() -> None:
    """On the meta device there is nothing to ask: whatever looked at a value would raise."""
    if version_of("transformers") < "5":
        pytest.skip("transformers 4.57 switches autocast, which knows no meta device")
    model = make_model("llama-tied").to("meta")
    tokens = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    past = model(input_ids=tokens, use_cache=True).past_key_values
    assert last_logits(model, tokens[:, :1], past).shape == (1, 1, 259)
    assert past.get_seq_length() == 8, "the cache is as it was"
    assert last_logits(model, tokens, None).shape == (1, 1, 259)
