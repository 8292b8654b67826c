"""The checkpoint of a model that lies on disk: its weights in one file, the factors in another, one layer in memory.

apply_factors(model, layers, dtype, "meta")        shapes alone
stream_checkpoint(model, layers, dtype, …)         each value read, rounded, written and forgotten
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco_export.checkpoint.biases import check_dense_parts
from soco_export.checkpoint.layers import replacement
from soco_export.checkpoint.reader import check_layer_tensors, pruned_layers
from soco_export.checkpoint.shards import write_shards
from soco_export.checkpoint.writer import SHARD, finish_folder, save_checkpoint
from soco_export.files.json import read_config
from soco_export.files.replacing import replacing_folder
from soco_export.files.safetensors import open_shards, weight_files
from soco_train.forms.base import FactoredLinear, LayerFactors
from soco_train.modules.layers import replace_module
from soco_train.store.tensorfile import Pending


def stream_checkpoint(
    model: Any,
    layers: Mapping[str, LayerFactors],
    dtype: torch.dtype,
    tokenizer: Any,
    out: Path,
    card: str | None = None,
    max_shard_size: int | str = SHARD,
) -> None:
    """Write the folder of `save_checkpoint`, to the byte, with one layer in memory.

    model: after `apply_factors(model, layers, dtype, "meta")`, its other weights views of their files (in any dtype).
    dtype: what is written. Arguments and errors as `save_checkpoint`. Put together in memory is a model that no folder
    holds, and one whose weights transformers 5 renames or merges as it reads them (mixtures of experts).
    """
    if not model.name_or_path or getattr(model, "_weight_conversions", None):
        for name, layer in layers.items():
            stood_for = _stood_for(model.get_submodule(name))
            replace_module(model, name, replacement(layer, dtype, stands_for=stood_for))
        save_checkpoint(model.to(dtype=dtype), tokenizer, out, card, max_shard_size)
        return
    check_dense_parts(model)
    written = dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
    with replacing_folder(out) as folder:
        model.save_pretrained(str(folder), state_dict={})  # all but the weights
        write_shards(folder, _pending(model, layers, dtype), max_shard_size, model.num_parameters())
        finish_folder(folder, model, tokenizer, card, written)
        check_layer_tensors(open_shards(weight_files(folder)), pruned_layers(read_config(folder)))


def _pending(model: Any, layers: Mapping[str, LayerFactors], dtype: torch.dtype) -> dict[str, Pending]:
    """Return what is to be written by name, a tied tensor once, under its first name."""
    homes = {f"{layer}.{part}": (layer, part) for layer in layers for part in model.get_submodule(layer).state_dict()}

    @lru_cache(maxsize=1)  # the tensors of a layer are written one after the other
    def state_of(layer: str) -> Mapping[str, torch.Tensor]:
        stood_for = _stood_for(model.get_submodule(layer))
        return replacement(layers[layer], dtype, stands_for=stood_for).state_dict()

    def cast(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    def read(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in homes:
            return cast(tensor)
        layer, part = homes[name]
        return state_of(layer)[part]

    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in (model._keys_to_ignore_on_save or ()):
            found.setdefault(id(tensor), (name, tensor.detach()))
    # layer by layer, as transformers 5 divides a model into shards
    ordered = sorted(found.values(), key=lambda entry: _natural(entry[0]))
    return {name: Pending(cast(tensor.to("meta")), partial(read, name, tensor)) for name, tensor in ordered}


def _stood_for(module: nn.Module) -> type[nn.Module]:
    """Return the class of the module that the model had in this place."""
    return module.stands_for if isinstance(module, FactoredLinear) else type(module)


def _natural(name: str) -> list[tuple[bool, int | str]]:
    """Sort by the parts of a dotted name, numbers as numbers."""
    return [(not part.isdigit(), int(part) if part.isdigit() else part) for part in name.split(".")]
