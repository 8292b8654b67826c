"""Attention whose values have fewer numbers than its keys: what a folder, or a recipe, makes of a description.

Such a layer is stored as head-rows and head-columns (soco_train/forms/heads.py), which hold the outer shapes. The graph
leaves the zeros out: Attention mixes and caches the small values.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm, WeightSource
from soco_train.errors import DataError, RecipeError
from soco_train.forms.heads import first_of_heads

_ROWS, _COLUMNS = "head-rows", "head-columns"


def narrowed(architecture: Architecture, source: WeightSource) -> Architecture:
    """Return the description with the numbers of a value head that each layer of `source` has.

    Raises DataError where a layer's two projections do not agree on them.
    """
    shape = architecture.attention
    each = []
    for index, layer in enumerate(architecture.each):
        prefix = architecture.tensors.layer.format(index)
        value, output = f"{prefix}.{shape.inputs[-1]}", f"{prefix}.{shape.output}"
        forms = source.form(value), source.form(output)
        if {_ROWS, _COLUMNS}.isdisjoint(form.kind for form in forms):
            each.append(layer)
            continue
        size = forms[0].rank // shape.kv_heads
        expected = StoredForm(_ROWS, shape.kv_heads * size), StoredForm(_COLUMNS, shape.heads * size)
        if len(shape.inputs) == 1 or forms != expected:
            raise _disagree(value, output)
        for name, heads in ((value, shape.kv_heads), (output, shape.heads)):
            if not np.array_equal(source.read(f"{name}.order")[:], first_of_heads(heads, shape.head_dim, size).numpy()):
                raise _disagree(value, output)
        each.append(replace(layer, values=size))
    return replace(architecture, each=tuple(each))


def _disagree(value: str, output: str) -> DataError:
    return DataError(
        f"{value} makes other values than {output} reads",
        fix="copy the checkpoint again, or write it again",
        where=value,
    )


def all_narrowed(architecture: Architecture, numbers: int) -> Architecture:
    """Return the description with so many numbers in every value head."""
    return replace(architecture, each=tuple(replace(layer, values=numbers) for layer in architecture.each))


def check_values(architecture: Architecture, settings: ExportSettings) -> None:
    """Raise RecipeError for a flavour whose attention takes no values of fewer numbers than keys."""
    if settings.flavour == "contrib" and architecture.small_values:
        raise RecipeError(
            "export.flavour is contrib, whose GroupQueryAttention takes values as large as keys only",
            fix="export.flavour: standard, or refine.values.keep: 1",
            where="export.flavour",
        )
