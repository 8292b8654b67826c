"""Which Linears take part, and the one way to put another module in the place of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Protocol, TypeVar

import torch
from torch import nn

from soco_train.errors import RecipeError
from soco_train.modules.sites import is_linear
from soco_train.settings.data import LayerSettings

_Module = TypeVar("_Module", bound=nn.Module)


class _Teacher(Protocol):
    """A module that answers as the dense layer it stands for while `teaching`."""

    teaching: bool


def select_linears(model: nn.Module, settings: LayerSettings) -> dict[str, nn.Linear]:
    """Return the participating Linears by qualified name, in model order; other layouts once `open_sites` was called.

    A module takes part if a glob of `include` matches its name and none of `exclude` does. Modules whose weight is
    shared with another parameter (a tied head) never take part. Raises RecipeError if nothing matches.
    """
    owners: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and is_linear(module)
        and owners[id(module.weight)] == 1
        and _matches(name, settings)
    }
    if not chosen:
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        raise RecipeError(
            f"no Linear of the model matches layers.include {list(settings.include)}",
            fix=f"adjust layers.include; the model's Linears look like {linears[:3] or 'none at all'}",
            where="recipe: layers.include",
        )
    return chosen


def _matches(name: str, settings: LayerSettings) -> bool:
    included = any(fnmatchcase(name, glob) for glob in settings.include)
    return included and not any(fnmatchcase(name, glob) for glob in settings.exclude)


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where `name` (dotted) is in `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


@contextmanager
def substituted(
    model: nn.Module, linears: Mapping[str, nn.Linear], make: Callable[[str, nn.Linear], _Module]
) -> Iterator[dict[str, _Module]]:
    """Put `make(name, linear)` in the place of each Linear for the duration of the context; all else is frozen."""
    layers: dict[str, _Module] = {}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    model.requires_grad_(False)
    try:
        for name, linear in linears.items():
            layers[name] = make(name, linear)
            replace_module(model, name, layers[name])
        yield layers
    finally:
        for name in layers:
            replace_module(model, name, linears[name])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(flags[name])


@contextmanager
def teaching(layers: Iterable[_Teacher]) -> Iterator[None]:
    """Within this context the layers answer as the dense ones, without gradients."""
    chosen = list(layers)
    for layer in chosen:
        layer.teaching = True
    try:
        with torch.no_grad():
            yield
    finally:
        for layer in chosen:
            layer.teaching = False


@contextmanager
def parked(linears: Iterable[nn.Linear]) -> Iterator[None]:
    """Within this context the layers lie in the host's memory, of no use; then they are back where they were."""
    places = {linear: linear.weight.device for linear in linears}
    try:
        for linear in places:
            linear.cpu()
        yield
    finally:
        for linear, device in places.items():
            linear.to(device)
