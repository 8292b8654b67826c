"""What the loops share of their optimisers: AdamW or Muon, the learning-rate curve, state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from soco_train import parallel
from soco_train.errors import RecipeError
from soco_train.settings.distill import OptimiserName

BETAS = (0.9, 0.95)
MUON_MOMENTUM = 0.9  # [ours]: of 0.7 to 0.95, where a distillation has tens to hundreds of steps
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


def optimisers(name: OptimiserName, parameters: Iterable[nn.Parameter], lr: float) -> list[torch.optim.Optimizer]:
    """Return what takes the steps of `parameters` together; no weight decay.

    muon (Jordan et al. 2024) is for matrices: a step is the momentum with all its singular values made 1, scaled to the
    size that AdamW's has (arXiv 2502.16982). It keeps one number a parameter where AdamW keeps two. Biases get AdamW.
    """
    parameters = list(parameters)
    if name == "adamw":
        return [_adamw(parameters, lr)]
    matrices = [parameter for parameter in parameters if parameter.ndim == 2]
    others = [parameter for parameter in parameters if parameter.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0, momentum=MUON_MOMENTUM, adjust_lr_fn="match_rms_adamw")
    return [muon, _adamw(others, lr)] if others else [muon]


def check_optimiser(name: OptimiserName) -> None:
    """Raise RecipeError if this PyTorch does not have it."""
    if name == "muon" and not hasattr(torch.optim, "Muon"):
        raise RecipeError(
            f"refine.distill.optimiser is muon, which PyTorch {torch.__version__} does not have",
            fix="install torch 2.9 or later, or set refine.distill.optimiser: adamw",
            where="recipe: refine.distill.optimiser",
        )


def _adamw(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    # one tensor after the other: PyTorch's default on a GPU takes a further 4 bytes for every number of all of them
    return torch.optim.AdamW(parameters, lr=lr, betas=BETAS, weight_decay=0, foreach=False)


def warmup_cosine(step: int, steps: int, warmup: float) -> float:
    """Return the learning-rate factor of `step`: linear warm-up, then cosine from 1 to 0.1."""
    rising = max(1.0, steps * warmup)
    if step < rising:
        return (step + 1) / rising
    progress = min(1.0, (step - rising) / max(1.0, steps - rising))
    return 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress))


def pack_state(parameters: Mapping[str, nn.Parameter], *stepping: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Return parameters and their moments in the optimisers as tensors named `parameter/…`, `exp_avg/…`, `step/…`, ….

    Whole, where processes have divided them: then all of them must call this, and process 0 has them.
    """
    tensors: dict[str, torch.Tensor] = {}
    for name, parameter in parameters.items():
        tensors[f"parameter/{name}"] = parallel.gathered(parameter.detach())
        for optimiser in stepping:
            for key, value in optimiser.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = parallel.gathered(value)
    return tensors


def unpack_state(
    tensors: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], *stepping: torch.optim.Optimizer
) -> None:
    """Undo `pack`, in place and bit for bit."""
    states = {
        parameter: optimiser.state
        for optimiser in stepping
        for group in optimiser.param_groups
        for parameter in group["params"]
    }
    for name, parameter in parameters.items():
        with torch.no_grad():
            parameter.copy_(parallel.divided_like(tensors[f"parameter/{name}"], parameter))
        found = {
            moment: parallel.divided_like(tensors[f"{moment}/{name}"], parameter)
            for moment in MOMENTS
            if f"{moment}/{name}" in tensors
        }
        if f"step/{name}" in tensors:
            found["step"] = tensors[f"step/{name}"].cpu()
        if found:
            states[parameter][parameter] = found
