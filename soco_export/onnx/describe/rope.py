"""Rotary frequencies from either spelling of the config: `rope_parameters`, or `rope_theta` with `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

from soco_export.onnx.describe.config import Config

Scaling = Callable[[torch.Tensor, Mapping[str, Any]], torch.Tensor]


def inverse_frequencies(config: Config, head_dim: int) -> tuple[float, ...]:
    """Return the [head_dim / 2] inverse frequencies in float32, scaled as the config says.

    Raises RecipeError for partial rotation and for scalings other than linear and llama3.
    """
    parameters = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **config.get("rope_scaling", {}),
    }
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in SCALINGS:
        raise config.refuse("rope_parameters", f"rope type {kind!r} is not one of {', '.join(sorted(SCALINGS))}")
    if parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise config.refuse("partial_rotary_factor", "only full rotation is described")
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    return tuple(SCALINGS[kind](1.0 / (theta**exponents), parameters).tolist())


def _plain(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    return frequencies


def _linear(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    return frequencies / parameters["factor"]


def _llama3(frequencies: torch.Tensor, parameters: Mapping[str, Any]) -> torch.Tensor:
    """Slow waves divided by `factor`, fast ones kept, those between blended. Source: Llama 3.1's reference code."""
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    context = parameters["original_max_position_embeddings"]
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    slow = torch.where(wavelength > context / low, frequencies / parameters["factor"], frequencies)
    blended = (1 - blend) * slow / parameters["factor"] + blend * slow
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return torch.where(between, blended, slow)


SCALINGS: dict[str, Scaling] = {"default": _plain, "linear": _linear, "llama3": _llama3}
