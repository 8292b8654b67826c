"""The sentence that a report says of calibrated rounding."""

from __future__ import annotations

from dataclasses import asdict

from soco_export.onnx.calibrate import LayerRounding, RoundingFigures
from soco_export.run.stages.report import rounding_note


def test_the_share_that_was_removed_and_too_few_tokens_are_told() -> None:
    layers = {"one": LayerRounding(0.02, 0.01, 64, 3.0, None), "two": LayerRounding(0.02, 0.005, 96, 3.0, 2.0)}
    figures = RoundingFigures("calibrated", 128, removed=0.625, few=1, layers=layers)
    said = rounding_note(asdict(figures))
    assert "62%" in said
    assert "128 tokens" in said
    assert "1 layers had fewer than 2 tokens an input" in said
    assert "fewer" not in rounding_note(asdict(figures) | {"few": 0})
