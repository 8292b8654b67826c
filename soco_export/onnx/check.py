"""What an export cannot do with an architecture, asked before anything is trained: no weights are needed."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families import describe
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.trace import check_fallback
from soco_train.errors import RecipeError


def check_architecture(config: Config, settings: ExportSettings) -> Architecture | None:
    """Return the description that an export will build from, None if the model will be traced.

    Raises RecipeError for a config key that the description does not know, and for settings that a flavour or the
    tracer cannot serve, or the rule of rounding; MachineError if the tracer is not installed.
    """
    rule = settings.rounding()
    for grid in settings.grids():
        rule.check(grid)
    architecture = describe(config)
    if architecture is None:
        check_fallback(config, settings)
    elif settings.flavour == "contrib":
        check_contrib(architecture, config)
    return architecture


def check_contrib(architecture: Architecture, config: Config) -> None:
    """Raise RecipeError for heads that GroupQueryAttention does not take."""
    size = architecture.attention.head_dim
    if size % 8:
        raise RecipeError(
            f"export.flavour is contrib, whose GroupQueryAttention takes heads of a multiple of 8, not {size} numbers",
            fix="export.flavour: standard",
            where=f"{config.where}: head_dim",
        )
