"""What may be compressed: a weight [m, n] that multiplies an input, however the model's module stores it.

Everything that learns works on nn.Linear. `open_sites` puts one in the place of every module that computes the same in
another layout, and three in that of every expert (experts.py); they are views of the stored weights, so nothing is
copied. `as_stored` is the way back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from soco_train.modules.experts import OpenExperts, is_stack

# Subclasses of nn.Linear that say the same in other words, by name: transformers' Falcon writes x @ weight.T + bias.
_SAME = ("FalconLinear",)


def is_linear(module: object) -> bool:
    """Tell whether a module computes x · weightᵀ + bias: nn.Linear, and subclasses that compute nothing else."""
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or type(module).__name__ in _SAME


def is_transposed(kind: type[nn.Module]) -> bool:
    """Tell whether modules of this class are transformers' Conv1D: a Linear whose weight is stored [n, m]."""
    return kind.__name__ == "Conv1D" and not issubclass(kind, nn.modules.conv._ConvNd)


def as_linear(module: nn.Module) -> nn.Linear | None:
    """Return an nn.Linear with the map, the numbers and the mode of `module`; None if it is no such map."""
    if is_linear(module):
        assert isinstance(module, nn.Linear)
        return module
    if not is_transposed(type(module)):
        return None
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(module.training)


def as_stored(linear: nn.Linear, kind: type[nn.Module]) -> nn.Module:
    """Return a module of the class `kind` with the map of `linear`: what a model of that class has in its place.

    A Conv1D has a bias always: zeros where the Linear has none.
    """
    if not is_transposed(kind):
        return linear
    with torch.device("meta"):
        stored = kind(linear.out_features, linear.in_features)
    stored.weight = nn.Parameter(linear.weight.detach().T.contiguous())
    bias = torch.zeros_like(linear.weight[:, 0]) if linear.bias is None else linear.bias.detach()
    stored.bias = nn.Parameter(bias)
    return stored.train(linear.training)


def open_sites(model: nn.Module) -> dict[str, nn.Module]:
    """Put nn.Linears in the place of each module that is the same map, and return what was there, by name.

    The numbers stay the model's own. Called again it finds nothing left to do.
    """
    closed: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        site = OpenExperts(module) if is_stack(module) else as_linear(module)
        if site is not None and site is not module:
            closed[name] = module
            model.set_submodule(name, site)
    return closed


@contextmanager
def opened(model: nn.Module) -> Iterator[None]:
    """Within this context the sites of a model are open; then its own modules are back, with their own numbers."""
    closed = open_sites(model)
    try:
        yield
    finally:
        for name, module in closed.items():
            model.set_submodule(name, module)
