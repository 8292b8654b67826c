"""What a short run of the built-in model writes is what it wrote when the seal was taken (seal.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from tests.whole.seal import GOLDEN, more_runs, take

pytestmark = pytest.mark.transformers

PARTS = ("names", "left out", "tensors", "graphs", "keys", "recipe", "results")


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def found(
    tiny_run: Path, short: tuple[str, ...], shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Return what is sealed of the runs, which one worker makes for all."""
    taken = shared / "seal.json"
    with FileLock(f"{taken}.lock"):
        if not taken.exists():
            runs = {"run": tiny_run, **more_runs(tiny_run, short, tmp_path_factory.mktemp("seal"))}
            taken.write_text(json.dumps(take(runs)), encoding="utf-8")
    return json.loads(taken.read_text(encoding="utf-8"))


@pytest.mark.parametrize("part", PARTS)
def test_names_are_those_of_the_seal(part: str, recorded: dict[str, Any], found: dict[str, Any]) -> None:
    assert found[part] == recorded[part]


def test_bytes_are_those_of_the_seal(recorded: dict[str, Any], found: dict[str, Any]) -> None:
    differs = {key: (value, found["machine"].get(key)) for key, value in recorded["machine"].items()}
    if differs := {key: pair for key, pair in differs.items() if pair[0] != pair[1]}:
        pytest.skip(f"numbers are rounded as this machine does: (recorded, here) differ in {differs}")
    changed = {name for name, digest in recorded["hashes"].items() if found["hashes"].get(name) != digest}
    assert sorted(changed) == []
    assert found["hashes"].keys() == recorded["hashes"].keys()
