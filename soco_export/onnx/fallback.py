"""Architectures without a description: transformers' own exporter, behind one function."""

from __future__ import annotations

from pathlib import Path

from soco_export.onnx.architecture import Config
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import RecipeError


def export_with_transformers(folder: Path, out: Path, config: Config, settings: ExportSettings) -> None:
    """Write `out`/model.onnx for an architecture without a description; RecipeError where that cannot be done."""
    raise RecipeError(
        f"{config['model_type']} has no description for the graph builder",
        fix="export --format hf or dense instead, or describe it in soco_export/onnx/families.py",
        where="config.json: model_type",
    )
