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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this environment has nothing for."""
    missing = {"optimum": find_spec("optimum") is None, "gpu": not Path("/dev/nvidia0").exists()}
    for item in items:
        for mark, absent in missing.items():
            if absent and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"no {mark} here"))
