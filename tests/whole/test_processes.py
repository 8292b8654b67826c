"""Two processes under torchrun learn what one learns from the same batches, scores and factors, by the command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from soco_train import parallel
from soco_train.errors import RecipeError
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from tests.support.cli import ROOT, soco
from tests.support.sharing import small_distillation

# Both processes of one launch import everything once, and fork for each command: (name, module, its arguments). Its two
# processes meet at a port of their own, which the first chooses; each leaves its exit code and what it said in files.
WORKER = """
import json, os, runpy, socket, sys, time
from pathlib import Path
import soco_export.preflight.checks, soco_export.run.stages.training, soco_export.run.verbs
import transformers.models.llama.modeling_llama
folder, rank = Path(sys.argv[1]), os.environ["RANK"]
del os.environ["TORCHELASTIC_USE_AGENT_STORE"]
os.environ["MASTER_ADDR"] = "127.0.0.1"
for name, module, *arguments in json.loads((folder / "commands.json").read_text()):
    port = folder / f"{name}.port"
    if rank == "0":
        with socket.create_server(("127.0.0.1", 0)) as free:
            (folder / name).write_text(str(free.getsockname()[1]))
        (folder / name).rename(port)
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        (folder / f"{name}.{rank}.code").write_text(str(code))
        continue
    for stream, ending in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}.{ending}", os.O_WRONLY | os.O_CREAT), stream)
    while not port.exists():
        time.sleep(0.02)
    os.environ["MASTER_PORT"], sys.argv[1:] = port.read_text(), arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)
    sys.exit()
"""
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
    # what follows the training is one process's work, as anywhere
    "evaluation.blocks=1",
    "evaluation.block=128",
    "validate.parity.blocks=1",
    "validate.parity.greedy_prompts=1",
)


# Two sharded processes leave every case behind at its third step.
CASES = {"rounded": {"optimiser": "adamw", "rounding": {"weights": "int4", "block": 16}}}
if hasattr(torch.optim, "Muon"):  # PyTorch has it from 2.9 on
    CASES["muon"] = {"optimiser": "muon"}
NEAR = {"rounded": 1e-5, "muon": 1e-4}  # muon makes matrices orthogonal in bf16


def arguments(out: Path) -> list[str]:
    settings = [word for setting in SETTINGS for word in ("--set", setting)]
    form = ["train-and-export", "--format", "hf"]
    return [*form, "--model", "smollm2-135m", "--tiny", "--keep-params", "0.5", *settings, "--out", str(out)]


@dataclass(frozen=True)
class Left:
    """What the two processes of each command left in `folder`."""

    folder: Path

    def said(self, command: str, process: int) -> tuple[int, str, str]:
        """Return exit code, stdout and stderr."""
        code, out, err = (self.folder / f"{command}.{process}.{ending}" for ending in ("code", "out", "err"))
        return int(code.read_text()), out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Left:
    """Run every command in two processes that torchrun starts."""
    folder = tmp_path_factory.mktemp("together")
    commands: list[list[Any]] = []
    for shard in ("false", "true"):
        settings = ("--set", f"refine.distill.shard={shard}", "--json")
        commands.append([shard, "soco_export", *arguments(folder / "runs" / shard), *settings])
    for case, changes in CASES.items():
        commands.append([case, "tests.support.sharing", str(folder / "left" / case), json.dumps(changes)])
    (folder / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    (folder / "worker.py").write_text(WORKER, encoding="utf-8")
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = subprocess.run(
        [*launcher, str(folder / "worker.py"), str(folder)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return Left(folder)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Path]:
    """Return exit code and folder of the run that one process makes."""
    folder = tmp_path_factory.mktemp("alone") / "one"
    return soco(*arguments(folder), "-q").code, folder


@pytest.mark.parametrize("shard", ["false", "true"])
def test_two_processes_learn_what_one_does_and_only_the_first_writes_and_speaks(
    shard: str, alone: tuple[int, Path], together: Left
) -> None:
    code, folder = alone
    found, out, err = together.said(shard, 0)
    assert found == code, err
    assert json.loads(out)["run"] == str(together.folder / "runs" / shard)
    assert together.said(shard, 1)[:2] == (0, "")
    two = together.folder / "runs" / shard
    one, its = (Scores.load(path / "scores.safetensors") for path in (folder, two))
    for name, layer in one.layers.items():
        other = its.layers[name]
        torch.testing.assert_close(other.scale, layer.scale, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.importance, layer.importance, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.deviation, layer.deviation, rtol=0, atol=1e-5)
    ones, twos = (Factors.load(path / "factors.safetensors").layers for path in (folder, two))
    for name, layer in ones.items():
        torch.testing.assert_close(twos[name].up, layer.up, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(twos[name].down, layer.down, rtol=1e-3, atol=1e-5)
    assert max(float((layer.scale - 1).abs().max()) for layer in one.layers.values()) > 0.1, "nothing was learnt"


@pytest.mark.parametrize("case", CASES)
def test_what_two_sharded_processes_left_one_process_finishes(case: str, together: Left, tmp_path: Path) -> None:
    for process in range(2):
        code, _, err = together.said(case, process)
        assert "Interrupted" in err, (code, err)
    found, steps = small_distillation(together.folder / "left" / case, **CASES[case])
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
