"""No command deletes or changes a file that this program did not write: every verb with every kind of output."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.cli import contents, soco
from tests.support.models import make_model, make_tokenizer

QUICK = ("--set", "evaluation.blocks=1", "--set", "evaluation.block=8", "--set", "gates.max_ppl_ratio=null")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "model"
    make_model("llama-tied").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "project" / "model"))


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def node_project(folder: Path) -> Path:
    (folder / "src").mkdir(parents=True)
    (folder / "config.json").write_text('{"name": "app"}')
    (folder / "manifest.json").write_text('{"name": "app"}')
    for name in ("hf", "onnx", "evidence", "unfinished"):
        (folder / name).mkdir()
        (folder / name / "precious.txt").write_text("mine")
    return folder


def own_model(folder: Path) -> Path:
    """A model that its owner added to: it was not written by this program."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.onnx").write_text("mine")
    return folder


def linked(folder: Path) -> Path:
    target = own_model(folder.parent / "linked-target")
    folder.symlink_to(target)
    return folder


def a_file(path: Path) -> Path:
    path.write_text("mine")
    return path


OUTPUTS: dict[str, Callable[[Path], Path]] = {
    "the model itself": lambda root: root / "project" / "model",
    "around the model": lambda root: root / "project",
    "inside the model": lambda root: root / "project" / "model" / "out",
    "another program's folder": lambda root: node_project(root / "app"),
    "a model of the user's": lambda root: own_model(root / "mine"),
    "a link": lambda root: linked(root / "link"),
    "a file": lambda root: a_file(root / "file"),
}
COMMANDS: dict[str, Callable[[Path], tuple[object, ...]]] = {
    "export to onnx": lambda root: ("export", root / "project" / "model", "--format", "onnx", *QUICK),
    "export to dense": lambda root: ("export", root / "project" / "model", "--format", "dense", *QUICK),
    "train": lambda root: ("train", "--model", root / "project" / "model"),
    "train and export": lambda root: ("train-and-export", "--model", root / "project" / "model", "--format", "hf"),
}


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_output_that_is_the_users_is_refused_and_stays(
    model: Path, tmp_path: Path, output: str, command: str, fresh: bool
) -> None:
    out = OUTPUTS[output](tmp_path)
    before = contents(tmp_path)
    ran = soco(*COMMANDS[command](tmp_path), "--out", out, *(("--fresh",) if fresh else ()))
    assert ran.code == 2, ran.err
    assert "fix:" in ran.err
    assert contents(tmp_path) == before


def test_a_broken_source_leaves_the_good_output(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "good"
    assert soco("export", model, "--format", "dense", "--out", out).code == 0
    before = contents(out)
    (model / "model.safetensors").write_bytes(b"broken")
    ran = soco("export", model, "--format", "dense", "--out", out, "--fresh")
    assert ran.code == 2, ran.err
    assert contents(out) == before


def test_an_earlier_export_is_replaced_only_when_asked_and_only_if_unchanged(model: Path, tmp_path: Path) -> None:
    command = ("export", model, "--format", "dense", "--out", tmp_path / "out")
    assert soco(*command).code == 0
    assert "--fresh" in soco(*command).err
    assert soco(*command, "--fresh").code == 0
    (tmp_path / "out" / "adapter.bin").write_text("mine")
    before = contents(tmp_path)
    assert soco(*command, "--fresh").code == 2
    assert contents(tmp_path) == before


def test_the_working_directory_is_no_output(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(model)
    monkeypatch.chdir(model)
    for fresh in ((), ("--fresh",)):
        assert soco("export", ".", "--format", "dense", "--out", ".", *fresh).code == 2
    assert contents(model) == before


@pytest.mark.parametrize("verb", ["validate", "bench", "export"])
def test_an_edited_model_in_a_run_is_left_as_it_is(run: Path, verb: str) -> None:
    (run / "hf" / "model.safetensors").write_bytes(b"fine-tuned")
    before = contents(run)
    ran = soco(verb, run)
    assert ran.code == 2
    assert "hf/model.safetensors (changed since it was written)" in ran.err
    assert "--against" in ran.err
    assert {name: data for name, data in contents(run).items() if name != "manifest.json"} == {
        name: data for name, data in before.items() if name != "manifest.json"
    }


@pytest.mark.parametrize("name", ["report.md", "results.json", "hf/README.md"])
def test_an_edited_report_is_not_written_over(run: Path, name: str) -> None:
    (run / name).write_text("my own words")
    ran = soco("report", run, "--set", "gates.max_ppl_ratio=9") if name != "results.json" else soco("validate", run)
    assert ran.code == 2, ran.err
    assert (run / name).read_text() == "my own words"


def test_judging_twice_is_no_edit(run: Path) -> None:
    assert soco("report", run, "--set", "gates.max_ppl_ratio=9").code == 0
    assert soco("report", run, "--set", "gates.max_ppl_ratio=8").code == 0


def test_fresh_refuses_before_anything_is_lost(run: Path, short: tuple[str, ...]) -> None:
    (run / "hf" / "model.safetensors").write_bytes(b"fine-tuned")
    (run / "hf" / "adapter.bin").write_text("mine")
    before = contents(run)
    ran = soco("train", "--model", "tiny", "--out", run, "--fresh")
    assert ran.code == 2
    assert contents(run) == before


def test_plans_are_not_written_over(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "plans"
    out.mkdir()
    (out / "plan-0.8.json").write_text("mine")
    ran = soco("plan", run, "--keep-params", "0.9,0.8", "--out", out)
    assert ran.code == 2
    assert contents(out) == {"plan-0.8.json": b"mine"}
