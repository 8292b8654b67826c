"""examples/ci, copied into a repository of a model: green on it, red on what became worse, not on noise."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from soco_export.files.records import record_file
from soco_export.run.folder.manifest import Manifest
from soco_train.store.factors import Factors
from tests.support.cli import Ran, script

CI = Path(__file__).parents[2] / "examples" / "ci"
LOOSE = ("gates.max_ppl_ratio=1000",)  # the shortest of trainings meets no real threshold; the baseline judges quality


@pytest.fixture
def repository(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a repository with the example's folder as ci/, a finished run, and that run as the committed baseline."""
    shutil.copytree(CI, tmp_path / "ci")
    shutil.copytree(tiny_run, tmp_path / "run")
    assert script("ci/gate.sh", "--accept", "run", folder=tmp_path).code == 0
    return tmp_path


def installed(*command: str, folder: Path, **environment: str) -> Ran:
    """Run a program whose `soco-export` is the one that is installed, a process for each call."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path, **environment}, capture_output=True, text=True
    )
    return Ran(done.returncode, done.stdout, done.stderr)


def judged(
    repository: Path, short: tuple[str, ...], *settings: str, run: Callable[..., Ran] = script, **environment: str
) -> tuple[int, str]:
    """Run the job in the copy of the finished run: only what changed is done again."""
    flags = [flag for setting in (*short, *LOOSE, *settings) for flag in ("--set", setting)]
    done = run("ci/gate.sh", "tiny", "run", *flags, folder=repository, **environment)
    assert "Traceback" not in done.err
    return done.code, done.out


def decode(repository: Path) -> dict[str, float]:
    """Return the speed-up of the decode step that the run measured, with its interval."""
    results = json.loads((repository / "run" / "results.json").read_text())
    return dict(results["latency"]["workloads"]["decode_32"]["speedup"])


def rewrite(repository: Path, low: float, value: float, high: float) -> None:
    """Let the committed baseline have decoded this many times faster than dense."""
    path = repository / "ci" / "baseline.json"
    baseline = json.loads(path.read_text())
    baseline["latency"]["workloads"]["decode_32"]["speedup"] |= {"low": low, "value": value, "high": high}
    path.write_text(json.dumps(baseline))


def forget_speed(repository: Path) -> None:
    """Let the committed baseline have measured no speed, so that quality alone decides."""
    path = repository / "ci" / "baseline.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"latency": None, "memory": None}))


def test_green_on_the_model_and_on_noise_with_summary_and_comment(repository: Path, short: tuple[str, ...]) -> None:
    summary, now = repository / "summary.md", decode(repository)
    # the same speed, seen on another day of the same noisy machine
    rewrite(repository, now["low"], now["value"] * 1.02, now["high"] * 1.02)
    code, said = judged(repository, short, run=installed, GITHUB_STEP_SUMMARY=str(summary), GITHUB_ACTIONS="true")
    assert (code, "tiny passes all gates" in said) == (0, True), said
    assert "::error" not in said
    assert summary.read_text() == (repository / "run" / "comment-ci.md").read_text()
    assert "tiny: PASSED" in summary.read_text()
    assert len(summary.read_text().partition("<details>")[0].splitlines()) < 40


def test_without_a_baseline_the_gates_judge_alone(repository: Path, short: tuple[str, ...]) -> None:
    (repository / "ci" / "baseline.json").unlink()
    code, said = judged(repository, short, "gates.max_ppl_ratio=1.0001", GITHUB_ACTIONS="true")
    assert (code, "tiny fails a gate" in said, "--accept run makes one" in said) == (3, True, True), said
    assert "::error title=soco-export::max_ppl_ratio: perplexity beside the dense model" in said


def worsen(run: Path, change: Callable[[Any], Any]) -> None:
    """Let the run have trained worse factors in its pruned layer of the highest rank; what follows is stale."""
    path = run / "factors.safetensors"
    factors = Factors.load(path)
    pruned = {name: layer for name, layer in factors.layers.items() if hasattr(layer, "up")}
    name, layer = max(pruned.items(), key=lambda item: item[1].up.shape[1])
    replace(factors, layers={**factors.layers, name: change(layer)}).save(path)
    manifest = Manifest.load(run)
    assert manifest is not None
    record = record_file(path)
    manifest.written[path.name] = manifest.stages["factors"].outputs[path.name] = record
    manifest.save(run)


def half(layer: Any) -> Any:
    """Keep the first half of the components."""
    rank = layer.up.shape[1] // 2
    return replace(layer, up=layer.up[:, :rank].contiguous(), down=layer.down[:rank].contiguous())


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda layer: replace(layer, up=torch.zeros_like(layer.up)), id="a layer zeroed"),
        pytest.param(half, id="a rank halved"),
    ],
)
def test_red_on_a_worsened_model(repository: Path, short: tuple[str, ...], change: Callable[[Any], Any]) -> None:
    worsen(repository / "run", change)
    forget_speed(repository)
    code, said = judged(repository, short, "bench.enabled=false")
    assert code == 3, said
    failed = [line.split(":")[0] for line in said.splitlines() if line.startswith("FAILED ")]
    assert any(name.startswith(("FAILED perplexity", "FAILED parity.compression")) for name in failed)


def test_red_on_other_data(repository: Path, short: tuple[str, ...]) -> None:
    forget_speed(repository)
    code, said = judged(repository, short, "evaluation.blocks=3", "bench.enabled=false")
    assert code == 3
    assert any(line.startswith("FAILED") and "the evaluation text" in line for line in said.splitlines()), said


def test_red_on_a_slower_runtime(repository: Path, short: tuple[str, ...]) -> None:
    now = decode(repository)
    # it was as many times faster as no noise explains: since then the runtime has become slower
    was = 3 * max(now["high"], 1 / now["low"])
    rewrite(repository, was * 0.99, was, was * 1.01)
    code, said = judged(repository, short)
    assert code == 3, said
    assert "FAILED latency.workloads.decode_32.speedup.value" in said


def test_the_workflows_call_what_is_there_and_keep_what_people_read() -> None:
    github = yaml.safe_load((CI / "github.yml").read_text(encoding="utf-8"))
    steps = github["jobs"]["gate"]["steps"]
    gitlab = yaml.safe_load((CI / "gitlab.yml").read_text(encoding="utf-8"))["compress"]
    for commands in ([step["run"] for step in steps if "run" in step], gitlab["script"]):
        scripts = [command.split()[0] for command in commands if command.startswith("ci/")]
        assert scripts == ["ci/gate.sh"]
    assert os.access(CI / "gate.sh", os.X_OK)
    kept = next(step["with"]["path"] for step in steps if "upload-artifact" in step.get("uses", ""))
    assert set(kept.split()) == set(gitlab["artifacts"]["paths"])
    assert gitlab["artifacts"]["reports"]["junit"] in kept
    assert any("--body-file run/comment-ci.md" in step.get("run", "") for step in steps)
