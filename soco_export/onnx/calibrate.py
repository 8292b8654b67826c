"""Calibrated rounding of a Hugging Face folder: run it over text, round each layer for its own inputs, keep the levels.

    text ── model ── C of some layers ── rounded, layer by layer ── files of levels ── (linear.py) the graph

What is in memory at one time: the model as it is stored, the covariances of a group of layers, and one layer's numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soco_export.files.atomic import remove
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent
from soco_train.forms.base import FORMS, FactoredLinear
from soco_train.forms.heads import HeadColumnsLinear
from soco_train.modules.sites import is_linear, open_sites
from soco_train.numbers.blocks import Grid, Levels, nearest
from soco_train.numbers.feedback import Curvature, curvature
from soco_train.numbers.pair import chain_error, kappa, product
from soco_train.numbers.rules import Inputs
from soco_train.settings.rounding import BITS
from soco_train.spectra.statistics import collect_statistics, groups, hardly_seen

# What chooses experts stays in floats in every export (onnx/emit/experts.py), whatever module a version makes of it.
ROUTERS = ("*.gate", "*.router", "*.router.*", "*.shared_expert_gate")

ENOUGH = 2  # tokens an input, below which a covariance is noise to a good part


@dataclass(frozen=True)
class LayerRounding:
    """How one layer was rounded: the mean squared error of its output as a share of its output's energy.

    nearest, error: with each factor to the nearest level, and as it was done; inputs: n; spread: tr(C) / tr(D) of
    C = LDLᵀ, what feedback can gain; kappa: what a pair's components make of white noise, None for a dense layer.
    """

    nearest: float
    error: float
    inputs: int
    spread: float
    kappa: float | None


@dataclass(frozen=True)
class RoundingFigures:
    """`removed`: share of nearest's error that is gone, the median layer's; `few`: layers with < 2 tokens an input."""

    rule: str
    tokens: int
    removed: float
    few: int
    layers: Mapping[str, LayerRounding]


@dataclass(frozen=True)
class KeptLevels:
    """Levels by the name of their tensor, each tensor's in a file of its own; what lies in `folder` is known."""

    folder: Path

    def put(self, found: Mapping[str, Levels]) -> None:
        """Keep the levels of one layer's tensors."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for name, part in found.items():
            tensors = {"levels": part.levels.to(torch.uint8), "scales": part.scales, "zeros": part.zeros}
            width = torch.tensor(part.width)
            whole = {"width": width, **{key: value.contiguous() for key, value in tensors.items()}}
            partial = self._path(name).with_suffix(".partial")
            save_file(whole, partial)
            partial.replace(self._path(name))

    def remove(self) -> None:
        """Delete the files, and forget the levels."""
        remove(self.folder)

    def get(self, name: str) -> Levels | None:
        """Return the levels of the tensor `name`; None if it has none."""
        if not self._path(name).exists():
            return None
        tensors = load_file(self._path(name))
        return Levels(width=int(tensors.pop("width")), **tensors)

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"


def calibrate(
    folder: Path, tokens: torch.Tensor, settings: ExportSettings, kept: KeptLevels, notify: Notify
) -> RoundingFigures:
    """Round every layer of `folder` that `settings` quantise, into `kept`; tokens: [b, t] of text that it is meant for.

    Pivoted layers are left out: their other rows are combinations of what would be rounded. So are experts that fewer
    tokens choose than they have components: these are rounded to nearest. Raises DataError for fewer tokens than a
    layer has inputs.
    """
    from soco_export.checkpoint.load import load_checkpoint

    model = load_checkpoint(folder).requires_grad_(False)
    open_sites(model)
    layers = rounded_layers(model, settings)
    _check_tokens(layers, tokens.numel())
    figures: dict[str, LayerRounding] = {}
    few = 0
    for name, chain, found, inputs in _rounded(model, layers, tokens, settings, notify):
        few += inputs.tokens < ENOUGH * len(inputs.covariance)
        kept.put(found)
        figures[name] = _figures(list(chain.values()), list(found.values()), grid_of(settings, name), inputs)
        notify(Event("rounding", len(figures), len(layers), {"layer": name}))
    removed = [1 - layer.error / layer.nearest for layer in figures.values() if layer.nearest]
    few += len(layers) - len(figures)
    return RoundingFigures(settings.quantize.rule, tokens.numel(), median(removed or [0.0]), few, figures)


def _rounded(
    model: nn.Module, layers: Mapping[str, nn.Linear], tokens: torch.Tensor, settings: ExportSettings, notify: Notify
) -> Iterator[tuple[str, dict[str, torch.Tensor], dict[str, Levels], Inputs]]:
    """Yield (layer, its matrices and their levels by the names of their tensors, what it reads)."""
    rule = settings.rounding()
    for name, module, inputs in _with_inputs(model, layers, tokens, notify):
        chain = chain_of(name, module)
        levels = rule.layer(list(chain.values()), grid_of(settings, name), inputs)
        yield name, chain, dict(zip(chain, levels, strict=True)), inputs


def grid_of(settings: ExportSettings, name: str) -> Grid:
    """Return the grid that the matrices of the layer `name` are rounded to."""
    how = settings.quantize
    return Grid(BITS[settings.weights_of(name)], how.block_of(name), how.symmetric)


def rounded_layers(model: nn.Module, settings: ExportSettings) -> dict[str, nn.Linear]:
    """Return what is rounded: Linears and pairs of factors, but for a head that multiplies with the rounded table."""
    shared = shared_table(model, settings)
    found: dict[str, Any] = {}
    for name, module in linear_layers(model):
        known = not isinstance(module, FactoredLinear) or FORMS[module.kind].rounded_as_trained
        if known and settings.quantizes(name) and module.weight is not shared:
            found[name] = module
    return found


def linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (name, module) of every Linear and factored layer, inside of which is no layer; of routers none."""
    factored: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, FactoredLinear):
            factored.append(f"{name}.")
            yield name, module
        elif is_linear(module) and not (name.startswith(tuple(factored[-1:])) or _routes(name)):
            yield name, module


def _routes(name: str) -> bool:
    return any(fnmatchcase(name, router) for router in ROUTERS)


def shared_table(model: nn.Module, settings: ExportSettings) -> torch.Tensor | None:
    """Return the token table if a tied head needs no copy of it in blocks of its own (onnx/emit/embedding.py)."""
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is embedding)
    table = cast(torch.Tensor, embedding.weight)
    whole = table.shape[1] % settings.quantize.table_block(name, table.shape[1]) == 0
    return table if whole and settings.table_of(name) != "same" else None


def _check_tokens(layers: Mapping[str, nn.Linear], tokens: int) -> None:
    for name, layer in layers.items():
        if tokens < layer.in_features:
            raise DataError(
                f"{tokens} tokens of calibration text cannot tell what {layer.in_features} inputs are like",
                fix=f"give at least {ENOUGH * layer.in_features} tokens, or export.quantize.rule: nearest",
                where=name,
            )


def _with_inputs(
    model: nn.Module, layers: Mapping[str, nn.Linear], tokens: torch.Tensor, notify: Notify
) -> Iterator[tuple[str, nn.Module, Inputs]]:
    """Yield each layer with what it reads, unless too little is known of that.

    Layers that read the same tensor share one factorisation.
    """
    latest: tuple[torch.Tensor, Curvature] | None = None
    for name, whole, seen in covariances(model, layers, tokens, notify):
        covariance = _of_read(layers[name], whole)
        if latest is None or latest[0] is not covariance:
            latest = covariance, curvature(covariance)
        yield name, layers[name], Inputs(covariance, latest[1], seen)


def covariances(
    model: nn.Module, layers: Mapping[str, nn.Linear], tokens: torch.Tensor, notify: Notify = silent
) -> Iterator[tuple[str, torch.Tensor, int]]:
    """Yield (layer, E[x xᵀ] of all its inputs in float64, tokens that reach it) of the layers that enough tokens reach.

    Layers that read the same tensor come with the same object.
    """
    for part in groups(layers, frozenset({"input_covariance"})):
        statistics = collect_statistics(model, part, tokens, frozenset({"input_covariance"}), notify)
        for name, module in part.items():
            if not hardly_seen(name, module, statistics[name]):
                yield name, cast(torch.Tensor, statistics[name].input_covariance), statistics[name].tokens or 0


def _of_read(module: nn.Module, covariance: torch.Tensor) -> torch.Tensor:
    """Return the covariance of those inputs that the layer's first matrix reads."""
    if not isinstance(module, HeadColumnsLinear):
        return covariance
    read = module.order[: module.rank]
    return covariance[read][:, read]


def chain_of(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the matrices that a layer's input goes through, by the names of their tensors, in float32."""
    up = getattr(module, "up", None)
    matrices = {f"{name}.weight": module.weight} | ({f"{name}.up.weight": up.weight} if up is not None else {})
    return {key: cast(torch.Tensor, matrix).detach().float() for key, matrix in matrices.items()}


def _figures(chain: list[torch.Tensor], found: list[Levels], grid: Grid, inputs: Inputs) -> LayerRounding:
    plain = [nearest(matrix, grid).values() for matrix in chain]
    target = product(chain)
    energy = chain_error([torch.zeros_like(matrix) for matrix in chain], inputs.covariance, target) or 1.0
    errors = [chain_error(values, inputs.covariance, target) for values in (plain, [part.values() for part in found])]
    return LayerRounding(
        nearest=errors[0] / energy,
        error=errors[1] / energy,
        inputs=chain[0].shape[1],
        spread=inputs.known.spread,
        kappa=kappa(chain[0], inputs.known) if len(chain) == 2 else None,
    )
