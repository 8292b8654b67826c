"""Two processes under torchrun learn what one learns from the same batches, scores and factors, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from soco_train import parallel
from soco_train.errors import RecipeError
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from tests.support.cli import ROOT, soco
from tests.support.sharing import small_distillation

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# Three sequences a batch: two for one process, one for the other.
SETTINGS = (
    "train.steps=8",
    "train.batch_tokens=192",
    "train.lr=0.02",
    "train.statistics_blocks=4",
    # The held-out loss of this random model rises, so the factors that are returned are not those of the last step.
    "refine.distill.steps=4",
    "refine.distill.batch_tokens=192",
    "refine.distill.held_out_blocks=2",
    "refine.distill.evaluate_every=2",
    "evaluation.blocks=2",
)


def arguments(out: Path) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    form = ["train-and-export", "--format", "hf"]
    return [*form, "--model", "smollm2-135m", "--tiny", "--keep-params", "0.5", *settings, "--out", str(out)]


def two_processes(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*LAUNCHER, *command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Return exit code and folder of the run that one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    return soco(*arguments(folder), "-q").code, folder


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_learn_what_one_does_and_only_the_first_writes_and_speaks(
    shard: str, alone: tuple[int, Path], tmp_path: Path
) -> None:
    code, folder = alone
    settings = ("--set", f"refine.distill.shard={shard}")
    done = two_processes(tmp_path, "-m", "soco_export", *arguments(tmp_path / "two"), *settings, "--json")
    assert done.returncode == code, done.stderr
    assert json.loads(done.stdout)["run"] == str(tmp_path / "two")
    one, two = (Scores.load(path / "scores.safetensors") for path in (folder, tmp_path / "two"))
    for name, layer in one.layers.items():
        other = two.layers[name]
        torch.testing.assert_close(other.scale, layer.scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.importance, layer.importance, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.deviation, layer.deviation, rtol=0, atol=1e-5)
    ones, twos = (Factors.load(path / "factors.safetensors").layers for path in (folder, tmp_path / "two"))
    for name, layer in ones.items():
        torch.testing.assert_close(twos[name].up, layer.up, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(twos[name].down, layer.down, rtol=1e-3, atol=1e-5)
    assert max(float((layer.scale - 1).abs().max()) for layer in one.layers.values()) > 0.1, "nothing was learnt"


# Both processes of one launch leave every case behind at its third step.
WORKER = """
import json, sys
from pathlib import Path
from tests.support.sharing import Interrupted, small_distillation
from soco_train import parallel
with parallel.group():
    for case, changes in json.loads(sys.argv[2]).items():
        try:
            small_distillation(Path(sys.argv[1], case), until=3, shard=True, **changes)
        except Interrupted:
            print("interrupted", flush=True)
"""
CASES = {"rounded": {"optimiser": "adamw", "rounding": {"weights": "int4", "block": 16}}}
if hasattr(torch.optim, "Muon"):  # PyTorch has it from 2.9 on
    CASES["muon"] = {"optimiser": "muon"}
NEAR = {"rounded": 1e-5, "muon": 1e-4}  # muon makes matrices orthogonal in bf16


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder in which two sharded processes left every case."""
    folder = tmp_path_factory.mktemp("left")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    done = two_processes(folder, str(folder / "worker.py"), str(folder), json.dumps(CASES))
    assert done.stdout.count("interrupted") == 2 * len(CASES), done.stderr
    return folder


@pytest.mark.parametrize("case", CASES)
def test_what_two_sharded_processes_left_one_process_finishes(case: str, left: Path, tmp_path: Path) -> None:
    found, steps = small_distillation(left / case, **CASES[case])
    assert steps[0] == 3
    expected, _ = small_distillation(tmp_path / "alone", **CASES[case])
    for name, layer in expected.items():
        torch.testing.assert_close(found[name].up, layer.up, rtol=1e-3, atol=NEAR[case])
        torch.testing.assert_close(found[name].down, layer.down, rtol=1e-3, atol=NEAR[case])


def test_shares_are_a_partition_and_their_weights_sum_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = torch.arange(14).reshape(7, 2)
    monkeypatch.setattr(parallel, "_processes", lambda: 3)
    found = []
    for rank in range(3):
        monkeypatch.setattr(parallel, "_rank", lambda rank=rank: rank)
        found.append(parallel.share(sequences))
    assert torch.equal(torch.cat([own for own, _ in found]), sequences)
    assert sum(weight for _, weight in found) == pytest.approx(1.0)
    means = sum(weight * own.double().mean() for own, weight in found)
    assert float(means) == pytest.approx(float(sequences.double().mean()))
    with pytest.raises(RecipeError, match="2 sequences cannot be shared between 3"):
        parallel.share(sequences[:2])


def test_a_process_alone_leads_and_shares_with_nobody() -> None:
    assert parallel.leading()
    own, weight = parallel.share(torch.ones(3, 4))
    assert own.shape == (3, 4)
    assert weight == 1.0
    assert torch.equal(parallel.combine(torch.ones(2), weight), torch.ones(2))
