"""The command line's surface: verbs and options are frozen, help is quick, bad input is said and costs nothing."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.main import get_command

from soco_export.cli import app
from soco_export.model.source import BUILTIN_MODEL
from soco_export.run import verbs
from soco_train.errors import RecipeError
from tests.support.cli import ROOT, contents, soco

GOLDEN = ROOT / "tests" / "golden" / "cli-options.json"
HEAVY = {"torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic", "rich", "yaml"}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def surface() -> dict[str, list[str]]:
    """Return the options of every verb, in the order that --help shows them."""

    def walk(command: object, name: str) -> dict[str, list[str]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            return {name: [" ".join(parameter.opts) for parameter in command.params]}  # type: ignore[attr-defined]
        found: dict[str, list[str]] = {}
        for key, value in inner.items():
            found |= walk(value, f"{name} {key}".strip())
        return found

    return walk(get_command(app), "")


def test_verbs_and_options_are_frozen() -> None:
    """A change here is a change of the contract with users: say so in CHANGELOG.md, then write the file anew."""
    assert surface() == json.loads(GOLDEN.read_text())


@pytest.mark.parametrize(
    ("fix", "said"),
    [
        ("wait for it, or give another --out", "wait for it"),
        ("move it away, or give another --out, or --fresh to start over there (all is then lost)", "move it away"),
        ("give an --out elsewhere; the same command goes on", "the same command goes on"),
        ("make it again; soco-export export RUN --out FOLDER", "make it again; soco-export export RUN --out FOLDER"),
        ("give another --out", "give another --out"),
    ],
)
def test_no_flag_is_advised_that_the_verb_lacks(fix: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*given: object, **asked: object) -> None:
        raise RecipeError("no", fix=fix)

    monkeypatch.setattr(verbs, "sweep", refused)
    monkeypatch.setattr(verbs, "train", refused)
    assert soco("sweep", "run").err == f"RecipeError: no\n  fix: {said}\n"
    assert soco("train").err == f"RecipeError: no\n  fix: {fix}\n"


def test_a_word_that_is_not_utf8_is_refused() -> None:
    """No record, report or JSON document could hold it: it failed as the manifest was written."""
    ran = soco("train-and-export", "--model", "tiny", "--out", os.fsdecode(b"a\xff"), "--json")
    assert ran.code == 2
    assert r"a\udcff is not UTF-8" in ran.err
    assert json.loads(ran.out)["exit_code"] == 2
    assert not list(Path().iterdir())


def cpu_seconds(*command: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *command], check=True, capture_output=True, cwd=ROOT, env={**os.environ})
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


# Typer's help of one option, as it is without what ours leaves out.
TYPERS_OWN = """
import typer
app = typer.Typer()
@app.command()
def verb(steps: int = typer.Option(1, help="how many")) -> None: "One verb."
app(["--help"])
"""


def test_help_costs_less_than_typers_own() -> None:
    """Seconds alone say as much about the machine (0.25 and 0.38 of one core when this was written)."""
    ours, control = (
        min(cpu_seconds(*command) for _ in range(3))
        for command in (("-m", "soco_export", "--help"), ("-c", TYPERS_OWN))
    )
    assert ours < control


def test_help_imports_nothing_heavy() -> None:
    code = f"import sys, soco_export.cli; sys.exit(', '.join(set(sys.modules) & {HEAVY}) or None)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [("recipes", "list"), ("recipes", "show", "tiny"), ("compare", "RUN", "RUN")])
def test_what_needs_no_model_does_without_torch(arguments: tuple[str, ...], tiny_run: Path) -> None:
    command = [str(tiny_run) if word == "RUN" else word for word in arguments]
    code = "import sys; from soco_export.cli import app; app(sys.argv[1:], standalone_mode=False); "
    code += "sys.exit(', '.join({'torch', 'transformers', 'onnx'} & set(sys.modules)) or None)"
    done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("no-such-verb",),
        ("train", "--no-such-option"),
        ("train-and-export", "--model", "tiny", "--format", "gguf"),
        ("train-and-export", "--model", "tiny", "--keep-params", "much"),
    ],
)
def test_wrong_usage_is_code_2(arguments: tuple[str, ...]) -> None:
    ran = soco(*arguments)
    assert ran.code == 2
    assert ran.out == ""
    assert "Error" in ran.err


def altered_model(folder: Path, name: str, change: object) -> Path:
    shutil.copytree(BUILTIN_MODEL, folder)
    weights = load_file(folder / "model.safetensors")
    weights[name] = change(weights[name])  # type: ignore[operator]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_nan(weight: torch.Tensor) -> torch.Tensor:
    weight = weight.clone()
    weight[1, 2] = float("nan")
    return weight


BAD_INPUT = {
    "unknown model": (("--model", "tinny"), 2, ("unknown model 'tinny'", "did you mean tiny?")),
    "unknown folder": (("--model", "./no/such"), 2, ("no/such",)),
    "unknown recipe": (("--recipe", "no-such.yaml"), 2, ("no recipe 'no-such.yaml'",)),
    "no model at all": ((), 2, ("no model", "--model")),
    "misspelt key": (("--model", "tiny", "--set", "train.step=4"), 2, ("train.step", "did you mean train.steps?")),
    "misspelt section": (("--model", "tiny", "--set", "gate.max_ppl_ratio=4"), 2, ("gate", "did you mean gates")),
    "no key=value": (("--model", "tiny", "--set", "keep_params"), 2, ("key=value",)),
    "keep_params of 0": (("--model", "tiny", "--keep-params", "0"), 2, ("keep_params", "greater than 0")),
    "keep_params above 1": (("--model", "tiny", "--keep-params", "1.5"), 2, ("keep_params", "1.5")),
    "no Linear matches": (("--model", "tiny", "--set", "layers.include=[nothing]"), 2, ("no Linear", "nothing")),
    "short text": (("--model", "tiny", "--set", "data.path=short.txt"), 2, ("short.txt", "one block needs 256")),
    "missing text": (("--model", "tiny", "--set", "data.path=missing.txt"), 2, ("cannot read missing.txt",)),
    "latin-1 text": (("--model", "tiny", "--set", "data.path=latin.txt"), 2, ("not UTF-8", "iconv")),
    "fp16 on the CPU": (("--model", "tiny", "--set", "export.dtype=float16"), 2, ("float16", "CPUExecutionProvider")),
    "absent provider": (
        ("--model", "tiny", "--set", "validate.provider=QNNExecutionProvider"),
        4,
        ("QNNExecutionProvider", "CPUExecutionProvider"),
    ),
    "other vocabulary": (("--model", "other-vocabulary"), 2, ("tokenizer and model disagree",)),
    "truncated weights": (("--model", "truncated"), 2, ("truncated or corrupt", "model.safetensors")),
    "weights as pickle": (("--model", "pickled"), 2, ("pickle",)),
    "another run's folder": (("--model", "tiny", "--out", "theirs"), 2, ("no run of soco-export", "thesis.tex")),
    "a file as folder": (("--model", "tiny", "--out", "short.txt"), 2, ("short.txt is a file",)),
    "no scorer of that name": (("--model", "tiny", "--set", "train.scorer=magic"), 2, ("magic", "fisher")),
    "no basis of that name": (("--model", "tiny", "--set", "train.basis=magic"), 2, ("magic", "whitened")),
}


@pytest.fixture
def bad_inputs(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "latin.txt").write_bytes("un café au lait ".encode("latin-1") * 1000)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    other = tmp_path / "other-vocabulary"
    shutil.copytree(BUILTIN_MODEL, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 1000}))
    truncated = tmp_path / "truncated"
    shutil.copytree(BUILTIN_MODEL, truncated)
    whole = (truncated / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    pickled = tmp_path / "pickled"
    shutil.copytree(BUILTIN_MODEL, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    (pickled / "pytorch_model.bin").write_bytes(b"anything")


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(case: str, tmp_path: Path, bad_inputs: None) -> None:
    arguments, code, words = BAD_INPUT[case]
    before = contents(tmp_path)
    ran = soco("train-and-export", *arguments)
    assert ran.code == code, ran.err
    assert ran.out == ""
    assert "Traceback" not in ran.err
    assert "\n  fix: " in ran.err
    for word in words:
        assert word in ran.err
    assert contents(tmp_path) == before
    assert not (tmp_path / "runs").exists()


def test_nan_in_a_weight(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    altered_model(tmp_path / "model", name, with_nan)
    ran = soco("train", "--model", tmp_path / "model")
    assert ran.code == 2
    assert f"{name} holds NaN or infinity in 1 of " in ran.err
    assert not list(tmp_path.glob("runs/*/*.safetensors"))


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ran = soco("train-and-export", "--model", "tiny")
    assert ran.code == 4
    assert "disk" in ran.err
    assert list(tmp_path.iterdir()) == []


def test_an_error_as_json(tmp_path: Path) -> None:
    ran = soco("train", "--model", "tinny", "--json")
    assert ran.code == 2
    error = json.loads(ran.out)["error"]
    assert error["kind"] == "RecipeError"
    assert error["where"] == "--model"


def test_dry_run_writes_nothing_and_needs_no_weights(tmp_path: Path) -> None:
    ran = soco("train-and-export", "--model", "mistral-7b", "--format", "onnx", "--dry-run", "--json")
    assert ran.code == 0, ran.err
    card = json.loads(ran.out)
    assert 7.2e9 < card["parameters"] < 7.3e9
    assert list(tmp_path.iterdir()) == []


def test_recipes() -> None:
    listed = soco("recipes", "list", "--json")
    assert {"tiny", "mistral-7b", "smollm2-135m"} <= set(json.loads(listed.out)["recipes"])
    shown = soco("recipes", "show", "tiny", "--set", "keep_params=0.33")
    assert "keep_params: 0.33" in shown.out
    assert soco("recipes", "check").code == 0


def test_overlays_are_listed_apart_and_shown_as_what_they_set() -> None:
    listed = json.loads(soco("recipes", "list", "--methods", "--json").out)["recipes"]
    assert "methods/svd-llm" in listed
    assert not set(listed) & set(json.loads(soco("recipes", "list", "--json").out)["recipes"])
    assert all(listed.values()), "each says what it is"
    shown = json.loads(soco("recipes", "show", "methods/two-sided-distilled", "--json").out)
    assert shown["refine"]["distill"]["steps"] == 100
    assert shown["train"]["basis"] == "two-sided", "from what it extends"
    assert "model" not in shown
    assert "gates" not in shown


def test_a_broken_recipe_fails_the_check(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("extends: tiny\ntrain: {stepz: 4}\n")
    ran = soco("recipes", "check", "tiny", "mine.yaml")
    assert ran.code == 2
    assert "tiny: ok" in ran.out
    assert "did you mean train.steps?" in ran.out


def test_doctor() -> None:
    ran = soco("doctor", "--json")
    found = json.loads(ran.out)
    assert ran.code == 0
    assert "torch" in found["versions"]
    assert {"python", "torch", "memory", "disk"} <= {finding["subject"] for finding in found["findings"]}


def test_two_onnxruntimes_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from soco_export.preflight import doctor

    monkeypatch.setattr(doctor, "version_of", lambda package: "5.0.0")
    ran = soco("doctor")
    assert "write the same folder" in ran.out
    assert "pip uninstall onnxruntime onnxruntime-gpu" in ran.out


def test_an_unknown_run_is_said() -> None:
    ran = soco("plan", "--keep-params", "0.9")
    assert ran.code == 2
    assert "there is no run in runs" in ran.err
