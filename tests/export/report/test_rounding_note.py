"""What a report says of rounding: of calibrated rounding, and of training for it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from soco_export.onnx.calibrate import LayerRounding, RoundingFigures
from soco_export.recipe.load import load_recipe
from soco_export.run.stages.report import distillation_notes, rounding_note
from soco_train.forms.base import LayerFactors
from soco_train.forms.dense import DenseWeight
from soco_train.forms.stacked import StackedFactors
from soco_train.store.factors import Factors


def test_the_share_that_was_removed_and_too_few_tokens_are_told() -> None:
    layers = {"one": LayerRounding(0.02, 0.01, 64, 3.0, None), "two": LayerRounding(0.02, 0.005, 96, 3.0, 2.0)}
    figures = RoundingFigures("calibrated", 128, removed=0.625, few=1, layers=layers)
    said = rounding_note(asdict(figures))
    assert "62%" in said
    assert "128 tokens" in said
    assert "1 layers had fewer than 2 tokens an input" in said
    assert "fewer" not in rounding_note(asdict(figures) | {"few": 0})


@pytest.mark.parametrize(
    ("dense", "factors", "steps", "said"),
    [
        (2, 1, 4, ["2 layers that stay dense were trained"]),
        (0, 1, 4, []),
        (0, 0, 4, ["nothing was trained"]),
        (0, 0, 0, []),
    ],
)
def test_what_was_trained_of_the_dense_layers_is_told(
    dense: int, factors: int, steps: int, said: list[str], tmp_path: Path
) -> None:
    layers: dict[str, LayerFactors] = {f"d{number}": DenseWeight(torch.randn(3, 2), None) for number in range(dense)}
    for number in range(factors):
        layers[f"f{number}"] = StackedFactors(torch.randn(3, 1), torch.randn(1, 2), None)
    Factors(layers).save(tmp_path / "factors.safetensors")
    settings = {"export.weights": "int4", "refine.distill.rounding.weights": "int4", "refine.distill.steps": steps}
    context: Any = SimpleNamespace(
        recipe=load_recipe("tiny").replace(settings), format="onnx", path=lambda stage, name: tmp_path / name
    )
    notes = list(distillation_notes(context))
    assert len(notes) == len(said)
    assert all(part in note for part, note in zip(said, notes, strict=True))
    context.format = "hf"
    assert any("here it is not" in note for note in distillation_notes(context)) == bool(steps and layers)
