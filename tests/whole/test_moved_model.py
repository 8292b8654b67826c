"""A run whose dense model was moved: `--model FOLDER` is taken where its files are those that were read."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from soco_export.model.source import BUILTIN_MODEL
from tests.support.cli import soco

KEYS = (
    "train.steps=1",
    "train.statistics_blocks=2",
    "refine.distill.steps=1",
    "refine.distill.batch_tokens=256",
    "data.blocks=8",
    "evaluation.blocks=1",
    "validate.parity.blocks=1",
    "validate.parity.greedy_prompts=1",
)
SHORT = [f"--set={key}" for key in KEYS]


@pytest.fixture(scope="module")
def moved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a run with scores and the folder to which its model has gone since."""
    root = tmp_path_factory.mktemp("moved")
    shutil.copytree(BUILTIN_MODEL, root / "before" / "model")
    trained = soco("train", "--model", str(root / "before" / "model"), "--out", str(root / "run"), *SHORT, "-q")
    assert trained.code == 0, trained.err
    shutil.move(root / "before", root / "after")
    return root / "run", root / "after" / "model"


def test_without_a_word_the_fix_names_the_flag(moved: tuple[Path, Path]) -> None:
    done = soco("export", str(moved[0]), "--format", "hf", "-q")
    assert done.code == 2, done.err
    assert "--model FOLDER" in done.err


def test_other_weights_are_refused_by_name(moved: tuple[Path, Path], tmp_path: Path) -> None:
    other = Path(shutil.copytree(moved[1], tmp_path / "model"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    done = soco("export", str(moved[0]), "--model", str(other), "--format", "hf", "-q")
    assert done.code == 2, done.err
    assert "another model" in done.err
    assert "model.safetensors" in done.err


def test_the_same_files_elsewhere_go_on_without_training(moved: tuple[Path, Path]) -> None:
    scores = (moved[0] / "scores.safetensors").stat().st_mtime_ns
    done = soco("export", str(moved[0]), "--model", str(moved[1]), "--format", "hf", "-q")
    assert done.code in (0, 3), done.err
    assert (moved[0] / "hf" / "config.json").is_file()
    assert (moved[0] / "scores.safetensors").stat().st_mtime_ns == scores


def test_a_folder_that_is_no_run_has_no_model_elsewhere(moved: tuple[Path, Path]) -> None:
    done = soco("export", str(moved[1]), "--model", str(moved[1]), "-q")
    assert done.code == 2, done.err
    assert "no run" in done.err
