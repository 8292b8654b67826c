"""Rotary frequencies from either spelling of the config: `rope_parameters`, or `rope_theta` with `rope_scaling`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from soco_export.onnx.describe.architecture import Rope
from soco_export.onnx.describe.config import Config


@dataclass(frozen=True)
class Scaling:
    """What a rope type reads: its parameters, base, how many numbers of a head turn, and the model's context."""

    parameters: Mapping[str, Any]
    theta: float
    width: int
    context: int

    @property
    def trained(self) -> int:
        """Context before it was extended."""
        return int(self.parameters.get("original_max_position_embeddings") or self.context)

    @property
    def factor(self) -> float:
        """How far the context is extended."""
        return float(self.parameters.get("factor") or self.context / self.trained)

    def powers(self) -> torch.Tensor:
        """Return theta^(2i / width), float32."""
        exponents: torch.Tensor = torch.arange(0, self.width, 2, dtype=torch.int64).float() / self.width
        return self.theta**exponents


ScalingFunction = Callable[[Scaling], Rope]
SCALINGS: dict[str, ScalingFunction] = {}


def scaling(*names: str) -> Callable[[ScalingFunction], ScalingFunction]:
    """Register a rope type."""

    def register(function: ScalingFunction) -> ScalingFunction:
        SCALINGS.update(dict.fromkeys(names, function))
        return function

    return register


def read_rope(config: Config, head_dim: int, kind: str | None = None, interleaved: bool = False) -> Rope:
    """Return the rotation of layers of `kind` (a key of `layer_types`; None: of all).

    Raises RecipeError for a rope type that is not known.
    """
    parameters = _parameters(config, kind)
    name = parameters.get("rope_type", parameters.get("type", "default"))
    if name not in SCALINGS:
        raise config.refuse("rope_parameters", f"rope type {name!r} is not one of {', '.join(sorted(SCALINGS))}")
    part = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    theta = parameters.get("rope_theta", config.get("rope_theta", 10000.0))
    if theta is None:
        raise config.refuse("rope_theta", "there is no rotation without its base")
    width = int(head_dim * part)
    if width % 2:
        raise config.refuse("rope_parameters", f"{width} numbers of each head are no pairs to turn")
    found = SCALINGS[name](Scaling(parameters, theta, width, config["max_position_embeddings"]))
    return replace(found, interleaved=interleaved)


def _parameters(config: Config, kind: str | None) -> Mapping[str, Any]:
    local = config.get("rope_local_base_freq")
    if local and kind == "sliding_attention" and not config.get("rope_parameters"):
        return {"rope_theta": local}  # how transformers 4 writes Gemma 3
    written = config.get("rope_parameters") or {
        "rope_theta": config.get("rope_theta", 10000.0),
        **config.get("rope_scaling", {}),
    }
    # transformers looks for `truncate` beside the tables of a layer type, never in one
    found = {**written[kind], "truncate": written.get("truncate", True)} if written.get(kind) else dict(written)
    # phi3 and others keep the trained context outside, where it wins
    trained = config.get("original_max_position_embeddings")
    return {**found, "original_max_position_embeddings": trained} if trained else found


def _rope(frequencies: torch.Tensor, **rest: Any) -> Rope:
    return Rope(tuple(frequencies.tolist()), **rest)


@scaling("default")
def _plain(given: Scaling) -> Rope:
    """theta^(-2i / width)."""
    return _rope(1.0 / given.powers())


@scaling("linear")
def linear(given: Scaling) -> Rope:
    """Positions divided by `factor`."""
    return _rope(1.0 / given.powers() / given.parameters["factor"])


@scaling("dynamic")
def dynamic(given: Scaling) -> Rope:
    """NTK scaling that grows with the sequence beyond the trained context."""
    return _rope(1.0 / given.powers(), growth=(given.factor, given.context, given.width))


@scaling("alpha")
def alpha(given: Scaling) -> Rope:
    """NTK scaling by a number instead of by length: theta · alpha^(width / (width - 2)). Source: HunYuan's class."""
    stretched = given.parameters["alpha"] ** (given.width / (given.width - 2))
    return _rope(1.0 / replace(given, theta=given.theta * stretched).powers())


@scaling("llama3")
def llama3(given: Scaling) -> Rope:
    """Slow waves divided by `factor`, fast ones kept, those between blended. Source: Llama 3.1's reference code."""
    parameters, frequencies = given.parameters, 1.0 / given.powers()
    low, high, context = parameters["low_freq_factor"], parameters["high_freq_factor"], given.trained
    wavelength = 2 * math.pi / frequencies
    blend = (context / wavelength - low) / (high - low)
    slow = torch.where(wavelength > context / low, frequencies / parameters["factor"], frequencies)
    blended = (1 - blend) * slow / parameters["factor"] + blend * slow
    between = (wavelength >= context / high) & (wavelength <= context / low)
    return _rope(torch.where(between, blended, slow))


@scaling("yarn")
def yarn(given: Scaling) -> Rope:
    """Fast waves kept, slow ones divided by `factor`, a ramp between; cosines magnified. Source: arXiv 2309.00071."""
    parameters, half = given.parameters, given.width // 2

    def pair(rotations: float) -> float:
        """Return the pair that turns `rotations` times within the trained context."""
        turns = math.log(given.trained / (rotations * 2 * math.pi))
        return given.width * turns / (2 * math.log(given.theta))

    low, high = pair(parameters.get("beta_fast") or 32), pair(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, given.width - 1)
    ramp = ((torch.arange(half, dtype=torch.float32) - low) / (high - low or 0.001)).clamp(0, 1)
    powers = given.powers()
    frequencies = 1.0 / (given.factor * powers) * ramp + 1.0 / powers * (1 - ramp)
    return _rope(frequencies, magnitude=_yarn_magnitude(given))


def _yarn_magnitude(given: Scaling) -> float:
    """Return what cosines and sines are multiplied with: 0.1 · ln(factor) + 1 unless the config says otherwise."""
    parameters, factor = given.parameters, given.factor

    def growth(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if (written := parameters.get("attention_factor")) is not None:
        return float(written)
    if parameters.get("mscale") and parameters.get("mscale_all_dim"):
        return growth(parameters["mscale"]) / growth(parameters["mscale_all_dim"])
    return growth(1.0)


@scaling("longrope", "su")
def longrope(given: Scaling) -> Rope:
    """A divisor for each pair, others beyond the trained context, and cosines magnified. Source: arXiv 2402.13753."""
    parameters, powers = given.parameters, given.powers()
    short, long = (torch.tensor(parameters[key], dtype=torch.float32) for key in ("short_factor", "long_factor"))
    magnitude = parameters.get("attention_factor")
    if magnitude is None:
        magnitude = math.sqrt(1 + math.log(given.factor) / math.log(given.trained)) if given.factor > 1 else 1.0
    beyond = tuple((1.0 / (long * powers)).tolist())
    return _rope(1.0 / (short * powers), magnitude=magnitude, switch=given.trained, beyond=beyond)
