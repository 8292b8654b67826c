"""A model in PyTorch with the numbers that an export would leave it: what a choice costs, before one is written.

What the graph does beside that (activations rounded to int8 in a product) is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from soco_export.onnx.calibrate import KeptLevels, grid_of, linear_layers, round_layers, shared_table
from soco_export.onnx.settings import ExportSettings
from soco_train.modules.sites import open_sites
from soco_train.numbers.blocks import Grid
from soco_train.settings import BITS


@torch.no_grad()
def round_as_exported(model: nn.Module, tokens: torch.Tensor, settings: ExportSettings, kept: KeptLevels) -> None:
    """Give every matrix of `model` the numbers that `settings` leave of it, in place.

    tokens: [b, t] of calibration text, for a rule that asks for it; kept: levels of dense layers, from one model for
    the next.
    """
    open_sites(model)
    known = dict(round_layers(model, tokens, settings, kept)) if settings.calibrates else {}
    shared, rule = shared_table(model, settings), settings.rounding()
    for name, module, layer in list(_matrices(model, settings)):
        if module.weight is not shared:
            levels = known.pop(f"{name}.weight", None)
            found = rule.rows(module.weight.float(), grid_of(settings, layer)) if levels is None else levels
            module.weight = nn.Parameter(found.values().to(module.weight.dtype), requires_grad=False)
    _round_table(model, settings)


def _round_table(model: nn.Module, settings: ExportSettings) -> None:
    """Round the token table in place: a head that shares it has the same numbers."""
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is table)
    kind = settings.table_of(name)
    if kind != "same":
        grid = Grid(BITS[kind], settings.quantize.table_block(name, table.weight.shape[1]), symmetric=True)
        table.weight.copy_(settings.rounding().rows(table.weight.float(), grid).values())


def _matrices(model: nn.Module, settings: ExportSettings) -> Iterator[tuple[str, Any, str]]:
    """Yield (name, module with a rounded `weight`, name of its layer): Linears, and the parts of factored ones."""
    for name, layer in linear_layers(model):
        if settings.quantizes(name):
            parts = [part.rpartition("weight")[0] for part, tensor in layer.named_parameters() if tensor.ndim == 2]
            for part in parts:
                yield f"{name}.{part}".rstrip("."), layer.get_submodule(part.rstrip(".")), name
