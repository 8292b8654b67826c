"""AdamW as both loops use it: the learning-rate curve, and its state as named tensors, so that nothing is pickled."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from soco_train import parallel

MOMENTS = ("exp_avg", "exp_avg_sq")


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Return the learning-rate factor of `step`: linear warm-up, then cosine from 1 to 0.1."""
    rising = max(1.0, steps * warmup)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1.0, steps - rising))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def pack(parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return parameters and AdamW moments as tensors named `parameter/…`, `exp_avg/…`, `exp_avg_sq/…`, `step/…`.

    Whole, where processes have divided them: then all of them must call this, and process 0 has them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parallel.gathered(parameter.detach())
        for key, value in optimiser.state.get(parameter, {}).items():
            tensors[f"{key}/{name}"] = parallel.gathered(value)
    return tensors


def unpack(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], optimiser: torch.optim.Optimizer
) -> None:
    """Undo `pack`, in place and bit for bit."""
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(parallel.divided_like(tensors[f"parameter/{name}"], parameter))
        if f"step/{name}" in tensors:
            moments = {key: parallel.divided_like(tensors[f"{key}/{name}"], parameter) for key in MOMENTS}
            optimiser.state[parameter] = {**moments, "step": tensors[f"step/{name}"].cpu()}
