"""Where in a model the first number appeared that is none."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn


@torch.no_grad()
def first_broken(model: nn.Module, tokens: torch.Tensor) -> str:
    """Return the name of the first module whose output for `tokens` [b, t] holds NaN or infinity, "" if none does."""
    found: list[str] = []
    hooks = [
        module.register_forward_hook(partial(_look, found, name)) for name, module in model.named_modules() if name
    ]
    try:
        model(input_ids=tokens, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else ""


def _look(found: list[str], name: str, module: nn.Module, arguments: Any, output: Any) -> None:
    if not found and isinstance(output, torch.Tensor) and not bool(output.isfinite().all()):
        found.append(name)
