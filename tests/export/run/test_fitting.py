"""Exporting a folder that is no run: what its proof reads is fitted to the model, and looked at first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from tests.export.model.test_models import byte_tokenizer
from tests.support.cli import soco

pytestmark = pytest.mark.transformers

FEW = ("--set", "evaluation.blocks=1", "--set", "validate.parity.blocks=1", "--set", "validate.threads=1")


def gpt2(folder: Path, positions: int = 64, rows: int = 256) -> Path:
    """A model that has nothing to say of a token, or of a place, beyond its tables."""
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_positions=positions, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_blocks_are_as_long_as_the_model_has_positions_and_that_is_said(tmp_path: Path) -> None:
    rounded = ("--set", "export.weights=int8", "--set", "export.quantize.rule=calibrated")
    ran = soco("export", gpt2(tmp_path / "hf"), "--out", tmp_path / "onnx", *FEW, *rounded)
    assert ran.code == 0, ran.err
    assert "evaluation.block is 64: the model has 64 positions, not 512" in ran.out
    assert "data.block is 64" in ran.out
    again = soco("validate", tmp_path / "onnx", "--against", tmp_path / "hf", *FEW)
    assert "evaluation.block is 64" in again.out
    assert "data.block" not in again.out  # no calibration text is read


def test_a_proof_is_as_short_as_the_model_and_a_merged_copy_has_none(tmp_path: Path) -> None:
    gpt2(tmp_path / "hf", positions=12)
    ran = soco("export", tmp_path / "hf", "--out", tmp_path / "onnx", *FEW)
    assert ran.code == 0, ran.err
    assert "validate.parity.decode_steps is 11" in ran.out
    merged = soco("export", tmp_path / "hf", "--format", "dense", "--out", tmp_path / "dense")
    assert merged.code == 0, merged.err
    assert "positions" not in merged.out


def cut(folder: Path) -> Path:
    file = folder / "tokenizer.json"
    file.write_text(file.read_text()[:-9])
    return folder


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: gpt2(folder, rows=100), "the model has 100 embedding rows"),
        (lambda folder: gpt2(folder, positions=4), "blocks of 8 tokens"),
        (lambda folder: cut(gpt2(folder)), "tokenizer.json"),
    ],
)
def test_what_the_proof_could_not_read_is_said_before_anything_is_written(
    made: Callable[[Path], Path], said: str, tmp_path: Path
) -> None:
    ran = soco("export", made(tmp_path / "hf"), "--out", tmp_path / "onnx", *FEW)
    assert ran.code == 2
    assert said in ran.err
    assert not (tmp_path / "onnx").exists()
