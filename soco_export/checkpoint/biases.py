"""What a plain model of a configuration holds, and whether a state fits it.

SoCo's deviation may have given a layer a bias that its architecture does not have. Inside a pruned layer that is no
matter; a dense weight's bias, though, would be dropped on loading without an error. Some architectures can switch
biases on, the others must be refused.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from soco_export.checkpoint.layers import factored_layers
from soco_train.errors import RecipeError
from soco_train.modules.experts import open_experts

BIAS_FLAGS = ("attention_bias", "mlp_bias")
KEEP_PRUNED = "keep the pruned form (hf, onnx), or train without it: train.deviation: false"


def plain_tensors(model: Any, flags: Mapping[str, bool], pruned: Iterable[str] = ()) -> dict[str, torch.Tensor]:
    """Return the state of an unpruned model like `model` with `flags` set in its config, on the meta device.

    Its mixtures are open if the layers `pruned` are among their experts'.
    """
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for flag, value in flags.items():
        setattr(config, flag, value)
    with torch.device("meta"):
        plain = type(model)(config)
        open_experts(plain, pruned)
        return dict(plain.state_dict())


def check_dense_parts(model: Any) -> None:
    """Raise RecipeError if a layer outside the pruned ones has a tensor that the architecture has no place for."""
    pruned = factored_layers(model)
    inside = tuple(f"{name}." for name in pruned)
    dense = [name for name in model.state_dict() if not name.startswith(inside)]
    _refuse(model, sorted(set(dense) - plain_tensors(model, {}, pruned).keys()), fix="plan it with a lower rank")


def bias_flags(model: Any, names: Iterable[str]) -> tuple[dict[str, bool], list[str]]:
    """Return the config flags that make room for the tensors `names`, and those of them that still have no place.

    Needs only the model's class and config, so that a run can ask before it trains: names like
    `model.layers.0.mlp.up_proj.bias`.
    """
    flags: dict[str, bool] = {}
    homeless = set(names) - plain_tensors(model, flags).keys()
    for flag in BIAS_FLAGS:
        if homeless and getattr(model.config, flag, None) is False:
            left = homeless - plain_tensors(model, {**flags, flag: True}).keys()
            if len(left) < len(homeless):
                flags, homeless = {**flags, flag: True}, left
    return flags, sorted(homeless)


def check_bias_places(model: Any, names: Iterable[str]) -> None:
    """Raise RecipeError unless some flags of the architecture make room for the tensors `names`."""
    _refuse(model, bias_flags(model, names)[1], fix=KEEP_PRUNED)


def fit_biases(model: Any, state: dict[str, torch.Tensor]) -> dict[str, bool]:
    """Return the config flags with which a plain model takes all of `state`, and fill in the biases they add as zeros.

    Raises RecipeError if no flag of the architecture makes room for a bias.
    """
    flags, homeless = bias_flags(model, state)
    _refuse(model, homeless, fix=KEEP_PRUNED)
    plain = plain_tensors(model, flags)
    for name in sorted(plain.keys() - state.keys()):
        state[name] = torch.zeros(plain[name].shape, dtype=model.dtype)
    return flags


def _refuse(model: Any, homeless: list[str], fix: str) -> None:
    if homeless:
        raise RecipeError(
            f"a plain {model.config.model_type} model has no place for {homeless[0]} ({len(homeless)} such tensors): "
            "the deviation that training gives these layers is a bias that the architecture lacks",
            fix=fix,
            where="train.deviation",
        )
