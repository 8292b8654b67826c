"""The examples run as they stand, each in a process of its own, on a finished run of the built-in model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "My fellow citizens of the Senate"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )


def generate(example: str, tiny_run: Path) -> str:
    done = run(sys.executable, EXAMPLES / example, tiny_run / "onnx", PROMPT, "--tokens", "16")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def torch_continuation(tiny_run: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    return str(tokenizer.decode(found[0], skip_special_tokens=True)).strip()


def test_quickstart(tmp_path: Path) -> None:
    done = run(sys.executable, EXAMPLES / "quickstart.py", "--out", tmp_path / "run", "--steps", "2")
    assert done.returncode == 0, done.stderr
    assert "layers left dense" in done.stdout
    assert "ok     max_export_kl" in done.stdout
    assert (tmp_path / "run" / "onnx" / "model.onnx").exists()


def test_pick_a_size(tiny_run: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    done = run(sys.executable, EXAMPLES / "pick_a_size.py", tmp_path / "run", "0.9", "0.6")
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()[1:]]
    assert [row[0] for row in rows] == ["0.9", "0.6"]
    parameters = [int(row[1].replace(",", "")) for row in rows]
    assert parameters[0] > parameters[1]


def test_plain_onnxruntime_gives_the_tokens_of_torch(tiny_run: Path) -> None:
    assert generate("onnxruntime_generate.py", tiny_run) == torch_continuation(tiny_run)


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="no onnxruntime-genai here")
def test_genai_gives_the_tokens_of_torch(tiny_run: Path) -> None:
    assert generate("genai_generate.py", tiny_run) == torch_continuation(tiny_run)


def test_the_generation_loop_needs_nothing_of_ours(tiny_run: Path) -> None:
    script = f"""
import runpy, sys
sys.argv = ["", {str(tiny_run / "onnx")!r}, {PROMPT!r}, "--tokens", "2"]
runpy.run_path({str(EXAMPLES / "onnxruntime_generate.py")!r}, run_name="__main__")
assert not {{"torch", "transformers", "soco_export"}} & set(sys.modules)
"""
    assert run(sys.executable, "-c", script).returncode == 0


@pytest.mark.parametrize(("ratio", "code"), [("1000", 0), ("1.0001", 3)])
def test_the_ci_job_passes_and_fails_by_its_gates(
    ratio: str, code: int, tiny_run: Path, tmp_path: Path, short: tuple[str, ...]
) -> None:
    # In a copy of the finished run only what the gates concern is done again.
    shutil.copytree(tiny_run, tmp_path / "run")
    settings = [flag for setting in (*short, f"gates.max_ppl_ratio={ratio}") for flag in ("--set", setting)]
    done = run(EXAMPLES / "gate_a_ci_job" / "gate.sh", "tiny", tmp_path / "run", *settings)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("passes all gates" if code == 0 else "fails a gate") in done.stdout
    assert "train" not in done.stderr


def test_the_workflow_calls_what_is_there() -> None:
    workflow = yaml.safe_load((EXAMPLES / "gate_a_ci_job" / "workflow.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["gate"]["steps"] if "run" in step]
    scripts = [command.split()[0] for command in commands if command.startswith("examples/")]
    assert scripts
    assert all((EXAMPLES.parent / script).is_file() for script in scripts)
