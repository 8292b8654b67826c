"""What every test runs under: one thread, no network, a seed, and one finished run of the built-in model for all."""

from __future__ import annotations

import os
import shutil
from importlib.util import find_spec
from pathlib import Path

# Before torch, onnxruntime or transformers are imported, and inherited by every process a test starts.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="120"
)

import pytest
from filelock import FileLock
from hypothesis import HealthCheck, settings

from tests.support.fresh import SEED, examples, seed_all

# How long an example takes, or to draw it, says more about the machine's other work than about the code.
settings.register_profile(
    "unhurried", deadline=None, max_examples=examples(100), suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("unhurried")

# A run as short as a run can be that still goes through every stage.
SHORT = (
    "train.steps=6",
    "train.batch_tokens=256",
    "train.statistics_blocks=8",
    "refine.distill.steps=2",
    "refine.distill.batch_tokens=256",
    "data.blocks=16",
    "evaluation.blocks=4",
    "validate.parity.blocks=2",
    "validate.parity.greedy_prompts=2",
    "validate.threads=1",
    "bench.rounds=2",
    "bench.seconds=0",
    "bench.cold_starts=1",
    "bench.prefill=[32]",
    "bench.past=32",
)


@pytest.fixture(scope="session")
def short() -> tuple[str, ...]:
    """Settings (`key=value`) that make a run of the built-in model take seconds."""
    return SHORT


@pytest.fixture(scope="session")
def tiny_run(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one finished run of the built-in model, to ONNX; read it, never write into it.

    Every worker has a copy: a verb on a run locks its folder.
    """
    from soco_export.run.verbs import Request, train_and_export

    first = shared / "first-run"
    with FileLock(f"{first}.lock"):
        if not (first / "done").exists():
            asked = Request(model="tiny", out=first / "tiny", set_=[*SHORT, "gates.max_ppl_ratio=null"])
            outcome = train_and_export(asked)
            assert outcome.code == 0, outcome.text
            (first / "done").touch()
    return Path(shutil.copytree(first / "tiny", tmp_path_factory.mktemp("runs") / "tiny"))


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of one pytest have in common; what is made in it is made under a lock."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Let hypothesis draw from the run's seed too."""
    if config.option.hypothesis_seed is None:
        config.option.hypothesis_seed = SEED


def pytest_sessionstart(session: pytest.Session) -> None:
    """Say how to have the same random input again."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        session.config.get_terminal_writer().line(f"random input: SOCO_TEST_SEED={SEED}")


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object], request: pytest.FixtureRequest) -> None:
    """Seed a fixture by its own name, so that it is the same whichever test asks for it first."""
    seed_all(f"{request.node.nodeid} {fixturedef.argname}[{request.param_index}]")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Seed a test by its own name."""
    seed_all(item.nodeid)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this environment has nothing for, and let files of long tests come first.

    One of two workers then makes `tiny_run` while the other, which has the second half, is busy; in the end short
    tests are left to be shared out.
    """
    on_a_run = {item.path for item in items if "tiny_run" in getattr(item, "fixturenames", ())}
    items.sort(key=lambda item: (item.path not in on_a_run, "whole" not in item.path.parts))
    missing = {"optimum": lambda: find_spec("optimum") is None, "gpu": _no_gpu}
    for mark, absent in missing.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and absent():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"no {mark} here"))


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()
