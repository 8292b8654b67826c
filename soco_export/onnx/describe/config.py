"""config.json with its class's defaults filled in, and what families read from it alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_export.onnx.describe.architecture import Activation
from soco_train.errors import DataError, RecipeError


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
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families/",
            where=f"{self.where}: {key}",
        )

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise unless `key` is absent or has one of the `allowed` values."""
        if self.get(key, allowed[0]) not in allowed:
            raise self.refuse(key, f"the graph builder knows only {', '.join(map(repr, allowed))}")


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


ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation(config: Config, key: str) -> Activation:
    """Return the activation that the config names under `key`; RecipeError for one that is not described."""
    if config[key] not in ACTIVATIONS:
        raise config.refuse(key, f"not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[config[key]]
