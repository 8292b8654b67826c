"""Where the dense model is and in which precision: fp32 on the CPU, the factors' dtype on a GPU, exact when taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging

from soco_export.model import load
from soco_export.model.source import BUILTIN_MODEL
from soco_export.recipe.load import load_recipe
from soco_export.run import on_run
from soco_export.run.context import RunContext
from soco_export.run.folder.held import RunFolder
from soco_export.run.request import Request
from soco_train.events import silent

pytestmark = pytest.mark.transformers


def a_context(root: Path, **settings: object) -> RunContext:
    recipe = load_recipe("tiny", [f"{key}={value}" for key, value in settings.items()])
    return RunContext(RunFolder(root, recipe, manifest=None), "onnx", silent)  # type: ignore[arg-type]


def dtypes(model: Any) -> set[torch.dtype]:
    return {parameter.dtype for parameter in model.parameters()}


def as_published(model: Any) -> bool:
    weights = load_file(BUILTIN_MODEL / "model.safetensors")
    state = model.state_dict()
    return all(torch.equal(weight.float(), state[name]) for name, weight in weights.items())


def test_a_run_keeps_the_bars_of_transformers_off_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[bool] = []
    monkeypatch.setattr(on_run.Pipeline, "run", lambda self: shown.append(logging.is_progress_bar_enabled()))
    monkeypatch.setattr(on_run, "check", lambda *asked: None)
    logging.enable_progress_bar()
    on_run.training(Request(model="tiny", out=tmp_path / "run"), silent)
    assert shown == [False]


def test_on_the_cpu_the_model_is_read_once_and_given_away_once(tmp_path: Path) -> None:
    context = a_context(tmp_path, **{"train.factor_dtype": "bfloat16"})
    model = context.model()
    assert dtypes(model) == {torch.float32}
    assert context.model() is model
    assert context.take_model() is model
    assert context.model() is not model
    assert as_published(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_holds_it_as_the_factors_are_and_gives_it_away_exact(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_on = load.put_on
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(load, "put_on", lambda model, device, dtype: put_on(model, {"cuda": "cpu"}[device], dtype))
    context = a_context(tmp_path, **{"train.factor_dtype": str(dtype).removeprefix("torch.")})
    assert dtypes(context.model()) == {dtype}
    assert context.model() is context.model()
    taken = context.take_model()
    assert dtypes(taken) == {torch.float32}
    assert as_published(taken)


def test_the_stored_model_is_as_its_files_have_it(tmp_path: Path) -> None:
    context = a_context(tmp_path)
    context.model()
    stored = context.take_stored_model()
    weights = load_file(BUILTIN_MODEL / "model.safetensors")
    assert dtypes(stored) == {weight.dtype for weight in weights.values()}
    assert as_published(stored.float())
    assert context._model is None
