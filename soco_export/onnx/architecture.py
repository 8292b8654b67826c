"""What a decoder is made of, as data, and the configuration that says so.

A family is one decorated function from a config to an `Architecture` (families.py). Everything else reads the
description.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from soco_train.errors import DataError, RecipeError

Activation = Literal["silu", "relu", "gelu", "gelu_tanh"]


@dataclass(frozen=True)
class Norm:
    """A normalisation over the last axis; `layer` subtracts the mean and has a bias, `rms` does neither."""

    kind: Literal["rms", "layer"]
    epsilon: float


@dataclass(frozen=True)
class Names:
    """Tensor names without `.weight`; those of a layer start with `layer`, where `{}` is the layer's number."""

    embed: str
    final_norm: str
    layer: str
    attention_norm: str
    mlp_norm: str
    query: str
    key: str
    value: str
    output: str
    mlp_in: tuple[str, ...]
    mlp_out: str
    query_norm: str | None = None
    key_norm: str | None = None
    positions: str | None = None
    head: str = "lm_head"


@dataclass(frozen=True)
class Architecture:
    """A pre-norm decoder with a key/value cache.

    `rope`: inverse frequencies [head_dim / 2] or None; `position_offset`: added to positions before the learned
    embedding; `windows`: per layer, how many keys a query sees (itself included) or None for all;
    two entries in `names.mlp_in` mean a gated MLP (gate first).
    """

    family: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    context: int
    norm: Norm
    activation: Activation
    windows: tuple[int | None, ...]
    tied: bool
    names: Names
    rope: tuple[float, ...] | None = None
    position_offset: int = 0

    @property
    def gated(self) -> bool:
        """Whether the MLP multiplies an activated gate into the up-projection."""
        return len(self.names.mlp_in) == 2

    def linears(self) -> dict[str, tuple[int, int]]:
        """Return name → (outputs, inputs) of all Linears, layer by layer, the head last."""
        names, hidden = self.names, self.hidden
        attended, kept = self.heads * self.head_dim, self.kv_heads * self.head_dim
        inside = {names.query: (attended, hidden), names.key: (kept, hidden), names.value: (kept, hidden)}
        inside |= {names.output: (hidden, attended)}
        inside |= {name: (self.intermediate, hidden) for name in names.mlp_in}
        inside |= {names.mlp_out: (hidden, self.intermediate)}
        each = range(self.layers)
        shapes = {f"{names.layer.format(i)}.{name}": shape for i in each for name, shape in inside.items()}
        return shapes | {names.head: (self.vocab, hidden)}

    def norms(self) -> dict[str, int]:
        """Return name → size of all normalisations."""
        names = self.names
        inside = {names.attention_norm: self.hidden, names.mlp_norm: self.hidden}
        inside |= {name: self.head_dim for name in (names.query_norm, names.key_norm) if name}
        sizes = {f"{names.layer.format(i)}.{name}": size for i in range(self.layers) for name, size in inside.items()}
        return sizes | {names.final_norm: self.hidden}


@dataclass(frozen=True)
class Config:
    """config.json with its class's defaults filled in.

    `defaults`: what the class declares; `shared`: keys of every config, which no forward pass of a decoder reads.
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    shared: frozenset[str]
    where: str

    def __getitem__(self, key: str) -> Any:
        return self.values[key]

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default` where it is absent or null."""
        value = self.values.get(key)
        return default if value is None else value

    def refuse(self, key: str, reason: str) -> RecipeError:
        """Return the error for a key that the graph builder cannot honour."""
        return RecipeError(
            f"config.json sets {key} to {self.values.get(key)!r}: {reason}",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families.py",
            where=f"{self.where}: {key}",
        )

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise unless `key` is absent or has one of the `allowed` values."""
        if self.get(key, allowed[0]) not in allowed:
            raise self.refuse(key, f"the graph builder knows only {', '.join(map(repr, allowed))}")


Describe = Callable[[Config], Architecture]
FAMILIES: dict[str, tuple[Describe, frozenset[str]]] = {}


def family(*model_types: str, keys: str) -> Callable[[Describe], Describe]:
    """Register a description for `model_types`; `keys` are the config keys that it understands, separated by spaces."""

    def register(describe: Describe) -> Describe:
        for model_type in model_types:
            FAMILIES[model_type] = (describe, frozenset(keys.split()))
        return describe

    return register


def read_config(folder: Path) -> Config:
    """Read `folder`/config.json; DataError if it is missing or no configuration."""
    from transformers import AutoConfig, PretrainedConfig

    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        resolved = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path.name}: {error}", fix="give an HF model folder", where=str(path)) from error
    # Either generation of transformers drops the other's way of writing rope: what is written wins.
    rope = {key: written[key] for key in ("rope_parameters", "rope_theta", "rope_scaling") if written.get(key)}
    shared = frozenset(PretrainedConfig().to_dict())
    return Config({**resolved.to_dict(), **rope}, type(resolved)().to_dict(), shared, str(path))
