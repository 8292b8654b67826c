"""A model whose code lies in its folder: refused by default, and taken the whole road where the recipe trusts it."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pytest

from soco_export.checkpoint.load import load_checkpoint
from soco_export.model.source import BUILTIN_MODEL
from soco_train.errors import DataError
from tests.support.cli import FEW_STEPS, soco
from tests.support.models import VOCABULARY, make_tokenizer, small_llama

pytestmark = pytest.mark.transformers
CODE = """
import os

from transformers import LlamaConfig, LlamaForCausalLM

os.environ["OWN_CODE_RAN"] = "yes"


class OwnConfig(LlamaConfig):
    model_type = "own-lm"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def forward(self, *args, **kwargs):
        found = super().forward(*args, **kwargs)
        found.logits = 0.5 * found.logits
        return found
"""
SET = (*FEW_STEPS, "--set", "export.flavour=standard")
TRUST = ("--set", "model.trust_remote_code=true")


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small Llama under another name, with code of its own that halves its logits."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.delenv("OWN_CODE_RAN", raising=False)
    monkeypatch.setattr(builtins, "input", lambda *words: pytest.fail("asked on stdin"))
    folder = tmp_path / "own"
    small_llama(vocab_size=VOCABULARY, max_position_embeddings=128, num_hidden_layers=1).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    (folder / "modeling_own.py").write_text(CODE)
    config = json.loads((folder / "config.json").read_text())
    config["model_type"], config["architectures"] = "own-lm", ["OwnForCausalLM"]
    config["auto_map"] = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("train-and-export", "--model", "own", "--dry-run"),
        ("train", "--model", "own", "--out", "run"),
        ("export", "own", "--out", "out"),
        ("export", "own", "--format", "dense", "--out", "out"),
        ("validate", "own", "--against", "own"),
        ("validate", "own", "--against", str(BUILTIN_MODEL)),
    ],
    ids=" ".join,
)
def test_it_is_refused_and_nothing_is_asked(own: Path, words: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(own.parent)
    ran = soco(*words)
    assert ran.code == 2, ran.err
    assert "trust_remote_code" in ran.err
    assert "OWN_CODE_RAN" not in os.environ
    assert {path.name for path in own.parent.iterdir()} <= {"own", "modules"}


def test_python_refuses_it_too(own: Path) -> None:
    with pytest.raises(DataError, match="its own code"):
        load_checkpoint(own)
    assert "OWN_CODE_RAN" not in os.environ


def test_trusted_it_goes_the_whole_road(own: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ran = soco("train-and-export", "--model", own, "--format", "hf", "--out", run, *SET, *TRUST)
    assert ran.code == 0, ran.err
    assert os.environ["OWN_CODE_RAN"] == "yes"
    assert (run / "hf" / "modeling_own.py").is_file()
    assert load_checkpoint(run / "hf", trust_remote_code=True).config.model_type == "own-lm"
    with pytest.raises(DataError, match="its own code"):
        load_checkpoint(run / "hf")
    traced = soco("export", run / "hf", "--out", tmp_path / "onnx", *SET, *TRUST)
    assert traced.code == 0, traced.err  # and agrees with the low-rank model, whose code halves the logits
    dense = soco("export", run / "hf", "--format", "dense", "--out", tmp_path / "dense", *TRUST)
    assert dense.code == 0, dense.err
    assert load_checkpoint(tmp_path / "dense", trust_remote_code=True).config.model_type == "own-lm"
