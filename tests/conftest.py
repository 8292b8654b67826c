"""What every test runs under: one thread, no network, and one finished run of the built-in model for all of them."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

# Before torch, onnxruntime or transformers are imported, and inherited by every process a test starts.
os.environ.update(
    OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", TOKENIZERS_PARALLELISM="false", COLUMNS="120"
)

import pytest
from hypothesis import settings

# How long an example takes says more about the machine's other work than about the code.
settings.register_profile("unhurried", deadline=None)
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
def tiny_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of one finished run of the built-in model, to ONNX; read it, never write into it."""
    from soco_export.run.verbs import Request, train_and_export

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    outcome = train_and_export(Request(model="tiny", out=folder, set_=[*SHORT, "gates.max_ppl_ratio=null"]))
    assert outcome.code == 0, outcome.text
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this environment has nothing for."""
    missing = {"optimum": lambda: find_spec("optimum") is None, "gpu": _no_gpu}
    for mark, absent in missing.items():
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and absent():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=f"no {mark} here"))


def _no_gpu() -> bool:
    import torch

    return not torch.cuda.is_available()
