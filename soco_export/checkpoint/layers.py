"""Factors into a model's Linears and back to dense, and the record of it in the model's config.

A layer whose rank reaches m would have the dense shape and save nothing, so `apply_factors` puts a plain nn.Linear
there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import torch
from torch import nn

from soco_export.checkpoint.record import PLAN_KEY, quantization_record
from soco_train.errors import DataError
from soco_train.forms.base import FactoredLinear, LayerFactors
from soco_train.forms.registry import LazyLayers, forms_of, from_factors
from soco_train.modules.experts import close_experts, open_experts, open_mixtures
from soco_train.modules.layers import replace_module
from soco_train.modules.sites import as_stored, opened
from soco_train.settings.rounding import WeightType
from soco_train.store.factors import Factors


def stored_factors(path: Path) -> LazyLayers[LayerFactors]:
    """Return the layers of a `factors.safetensors`, each read when it is asked for."""
    return LazyLayers(forms_of(Factors.load(path).layers), lambda name: Factors.load(path, name).layers[name])


def apply_factors(
    model: nn.Module,
    factors: Factors | Mapping[str, LayerFactors],
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> None:
    """Replace each layer that `factors` names, keeping its mode, and its dtype and device unless they are given.

    Mixtures are open afterwards if experts are among them (modules/experts.py), else closed. A layer of full rank
    becomes one dense module. On the device `meta` layers have shapes alone; `replacement` gives the values. Raises
    DataError, with the model untouched, if a name is not a Linear of the model or a shape differs.
    """
    layers = factors.layers if isinstance(factors, Factors) else factors
    forms = forms_of(layers)
    with opened(model):
        modules = dict(model.named_modules())
        for name, form in forms.items():
            _check_same_layer(name, modules.get(name), form)
        del modules  # with it the dense weights, one at a time as they are replaced
    open_mixtures_of(model, forms)
    for name, layer in (forms if str(device) == "meta" else layers).items():
        replaced = model.get_submodule(name)
        weight = cast(torch.Tensor, replaced.weight)
        module = replacement(layer, dtype or weight.dtype, device or weight.device, type(replaced))
        replace_module(model, name, module.train(replaced.training))
    if str(device) != "meta":  # what is streamed stays in its file
        for _, experts in open_mixtures(model):
            for parameter in experts.parameters():  # a view of a turned stack: transformers saves no such thing
                parameter.data = parameter.data.contiguous()
    record_layers(model)


def replacement(
    layer: LayerFactors,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    stands_for: type[nn.Module] = nn.Linear,
) -> nn.Module:
    """Return what `apply_factors` puts in the place of a module of the class `stands_for`.

    A product is formed before anything is rounded.
    """
    sizes = from_factors(layer, device="meta")
    if sizes.rank < sizes.full_rank(sizes.out_features, sizes.in_features):
        factored = from_factors(layer, dtype, device)
        factored.stands_for = stands_for
        return factored
    return as_stored(from_factors(layer, device=device).to_linear().to(dtype), stands_for)


def open_mixtures_of(model: nn.Module, names: Iterable[str]) -> None:
    """Have the mixtures of `model` open if layers of their experts are among `names`, else closed.

    Files of an open model have the names that it has in memory: what transformers 5 would merge is none of its tensors.
    """
    if open_experts(model, names):
        model._weight_conversions = []  # type: ignore[assignment]
    else:
        _close(model)


def _close(model: nn.Module) -> None:
    """Put stacks back in the place of open mixtures that can be closed; files then have their publisher's names."""
    if close_experts(model):
        model.__dict__.pop("_weight_conversions", None)


def _check_same_layer(name: str, module: nn.Module | None, layer: LayerFactors) -> None:
    m, n = layer.shape
    if not isinstance(module, nn.Linear) or module.weight.shape != (m, n):
        raise DataError(
            f"the factors of {name} make a Linear of {m} × {n}, the model has {module or 'nothing'} there",
            fix="use the factors of this model's own run",
            where=name,
        )


def factored_layers(model: nn.Module) -> dict[str, FactoredLinear]:
    """Return the pruned modules by qualified name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, FactoredLinear)}


def dense_module(module: FactoredLinear) -> nn.Module:
    """Return the dense module of the model's own class with the map of a pruned one."""
    return as_stored(module.to_linear(), module.stands_for)


def merge_dense(model: nn.Module) -> None:
    """Replace each pruned module by a dense one with the same map; the product is formed in float32 or float64.

    Open mixtures are closed, unless a deviation gave their experts biases.
    """
    for name, module in factored_layers(model).items():
        replace_module(model, name, dense_module(module))
    _close(model)
    record_layers(model)


def record_layers(model: nn.Module) -> None:
    """Write which layers are pruned into `model.config`, if there is one, so that `save_pretrained` keeps it.

    The record is the config's `quantization_config`; a model without pruned layers has none.
    """
    config = getattr(model, "config", None)
    if config is None:
        return
    layers = {
        name: {"kind": module.kind, "rank": module.rank, "bias": module.dense_bias() is not None}
        for name, module in factored_layers(model).items()
    }
    if layers:
        config.quantization_config = quantization_record(layers)
    elif hasattr(config, "quantization_config"):
        del config.quantization_config


def record_types(model: nn.Module, weights: Mapping[str, WeightType], blocks: Mapping[str, int]) -> None:
    """Write into `model.config` the types and blocks that a plan chose for each layer and the token table."""
    if weights:
        setattr(model.config, PLAN_KEY, {"weights": dict(weights), "blocks": dict(blocks)})


def count_parameters(model: nn.Module) -> int:
    """Return how many numbers the model's parameters hold; a tied parameter counts once, `order` not at all."""
    return sum(parameter.numel() for parameter in model.parameters())
