"""A model in PyTorch with the numbers that an export would leave it: what a choice costs, before one is written.

What the graph does beside that (activations rounded to int8 in a product) is not in it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soco_export.files.atomic import write_atomic
from soco_export.onnx.calibrate import (
    KeptLevels,
    chain_of,
    covariances,
    grid_of,
    linear_layers,
    rounded_layers,
    shared_table,
)
from soco_export.onnx.settings import ExportSettings
from soco_train.forms.base import FactoredLinear
from soco_train.modules.sites import open_sites
from soco_train.numbers.blocks import Grid, Levels
from soco_train.numbers.feedback import curvature
from soco_train.numbers.rules import Inputs
from soco_train.settings.rounding import BITS


class ReadInputs:
    """What the layers of one model read on one text, C = E[x xᵀ]: found in one pass, then kept in `folder`."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor, folder: Path) -> None:
        self.model, self.tokens, self.folder = model, tokens, folder
        self._latest: tuple[str, Inputs] | None = None

    def of(self, name: str) -> Inputs | None:
        """Return what a layer reads, ready for rounding; None if it was hardly seen to read anything."""
        if name not in self._files:
            return None
        file, tokens = self._files[name]
        if self._latest is None or self._latest[0] != file:
            covariance = load_file(self.folder / file)["covariance"]
            self._latest = file, Inputs(covariance, curvature(covariance), tokens)
        return self._latest[1]

    @cached_property
    def _files(self) -> dict[str, tuple[str, int]]:
        """By layer the name of its file, which layers that read one tensor share, and the tokens that reach it."""
        index = self.folder / "index.json"
        if not index.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(index, json.dumps(dict(self._collect()), indent=1) + "\n")
        found = json.loads(index.read_text(encoding="utf-8"))
        return {name: (file, tokens) for name, (file, tokens) in found.items()}

    def _collect(self) -> Iterator[tuple[str, tuple[str, int]]]:
        open_sites(self.model)
        latest: torch.Tensor | None = None
        file = ""
        for name, covariance, tokens in covariances(self.model, dict(linear_layers(self.model)), self.tokens):
            if covariance is not latest:
                latest, file = covariance, f"{name}.safetensors"
                save_file({"covariance": covariance.cpu().contiguous()}, self.folder / file)
            yield name, (file, tokens)


class Rounder:
    """Levels of layers by a rule that calibrates, each (layer, form, rank, grid) found once and kept in `folder`.

    model, tokens: whose inputs on what text [b, t] layers are rounded for; models that differ from it in some layers
    are rounded for the same. Types of more than `most_bits` are left to their rows: nearly nothing is lost there.
    """

    def __init__(self, model: nn.Module, tokens: torch.Tensor, folder: Path, most_bits: int = 8) -> None:
        self.inputs, self.kept = ReadInputs(model, tokens, folder / "inputs"), KeptLevels(folder / "levels")
        self.most_bits = most_bits

    def levels(self, model: nn.Module, settings: ExportSettings) -> Iterator[tuple[str, Levels]]:
        """Yield (name of a tensor, its levels) of every layer of `model` that an export would calibrate."""
        for name, layer in rounded_layers(model, settings).items():
            if grid_of(settings, name).bits <= self.most_bits:
                yield from self._layer(name, layer, settings).items()

    def _layer(self, name: str, layer: nn.Module, settings: ExportSettings) -> dict[str, Levels]:
        grid, chain = grid_of(settings, name), chain_of(name, layer)
        form = f"{layer.kind}-{layer.rank}" if isinstance(layer, FactoredLinear) else "dense"
        keys = {tensor: f"{tensor} {form} int{grid.bits}-{grid.block}" for tensor in chain}
        known = {tensor: self.kept.get(key) for tensor, key in keys.items()}
        found = {tensor: levels for tensor, levels in known.items() if levels is not None}
        if len(found) < len(chain) and (inputs := self.inputs.of(name)) is not None:
            made = settings.rounding().layer(list(chain.values()), grid, inputs)
            found = dict(zip(chain, made, strict=True))
            self.kept.put({keys[tensor]: levels for tensor, levels in found.items()})
        return found


@torch.no_grad()
def round_as_exported(model: nn.Module, settings: ExportSettings, rounder: Rounder) -> None:
    """Give every matrix of `model` the numbers that `settings` leave of it, in place; `rounder`: if they calibrate."""
    open_sites(model)
    known = dict(rounder.levels(model, settings)) if settings.calibrates else {}
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
