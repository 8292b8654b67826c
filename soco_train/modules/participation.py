"""Which weights of the blocks are compressed, and why each other one is not: nothing is left out in silence."""

from __future__ import annotations

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import nn

from soco_train.modules.values import narrowed_names
from soco_train.plan.left_out import LeftOut
from soco_train.settings.data import LayerSettings
from soco_train.settings.refine import ValueSettings


def left_out(
    model: nn.Module, linears: Iterable[str], settings: LayerSettings, values: ValueSettings | None = None
) -> dict[str, LeftOut]:
    """Return the weights inside the blocks of `model` that are in none of the `linears`, by tensor name.

    model: open (sites.py); values: `refine.values`. Weights are tensors of two axes or more; a block is what has a
    number in its name.
    """
    known = narrowed_names(model, values) if values else {}
    chosen = {f"{name}.weight" for name in linears}
    return {
        name: _narrowed(tensor, *known[place])
        if (place := name.rpartition(".")[0]) in known
        else LeftOut(tuple(tensor.shape), _reason(model, name, settings))
        for name, tensor in model.named_parameters()
        if tensor.ndim >= 2 and _NUMBERED.search(name) and name not in chosen
    }


def _narrowed(tensor: torch.Tensor, reason: str, share: float) -> LeftOut:
    return LeftOut(tuple(tensor.shape), reason, round(share * tensor.numel()))


_NUMBERED = re.compile(r"\.\d+\.")


def _reason(model: nn.Module, name: str, settings: LayerSettings) -> str:
    place = name.rpartition(".")[0]
    if glob := next((glob for glob in settings.exclude if fnmatchcase(place, glob)), ""):
        return f"layers.exclude has {glob}"
    if not any(fnmatchcase(place, glob) for glob in settings.include):
        return "no glob of layers.include matches"
    module, tensor = model.get_submodule(place), model.get_parameter(name)
    if isinstance(module, nn.Linear):
        return "its weight is shared with another module"
    if tensor.ndim > 2:
        return f"{type(module).__name__} holds its matrices in one tensor, which is not compressed"
    return f"{type(module).__name__} is no Linear"
