"""The Python API does what the command line does: the same scores and factors, whichever way they are asked for."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import soco_export
import soco_train
from soco_export.model.source import BUILTIN_MODEL
from soco_export.run.folder.allowed import read_lock
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores

pytestmark = pytest.mark.transformers


def test_the_api_learns_and_cuts_what_the_command_line_does(tiny_run: Path, tmp_path: Path) -> None:
    recipe = read_lock(tiny_run)
    model = AutoModelForCausalLM.from_pretrained(BUILTIN_MODEL, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODEL)
    tokens = soco_train.load_blocks(tokenizer, recipe.data, "calibration").tokens

    scores = soco_train.learn_scores(model, tokens, tmp_path, recipe.train, recipe.plan, recipe.layers)
    for name, layer in Scores.load(tiny_run / "scores.safetensors").layers.items():
        torch.testing.assert_close(scores.layers[name].importance, layer.importance, rtol=0, atol=0)

    plan = soco_train.plan_ranks(scores, recipe.plan)
    factors = soco_train.cut_factors(model, tokens, scores, plan, tmp_path, recipe.refine)
    expected = Factors.load(tiny_run / "factors.safetensors")
    assert set(factors.layers) == set(expected.layers)
    for name, layer in expected.layers.items():
        for part, tensor in vars(layer).items():
            # not to the bit: CPU kernels round differently by how the weights they are given lie in memory
            torch.testing.assert_close(getattr(factors.layers[name], part), tensor, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("package", [soco_train, soco_export], ids=lambda package: package.__name__)
def test_every_public_name_is_there_and_documented(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
