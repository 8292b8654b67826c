"""config.json as a description reads it: every key, what its class would have said, and refusals by the key's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soco_export.files.json import making_a_model
from soco_export.files.json import read_config as read_fields
from soco_export.files.wrapped import decoder_config, language_model
from soco_train.errors import DataError, RecipeError


@dataclass(frozen=True)
class Config:
    """config.json with its class's defaults filled in.

    `defaults`: what the class declares; `shared`: keys of every config, which no forward pass of a decoder reads;
    `aliases`: the usual name of a key → its name here (hidden_size → n_embd).
    """

    values: Mapping[str, Any]
    defaults: Mapping[str, Any]
    shared: frozenset[str]
    where: str
    aliases: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        if key in self.values:
            return self.values[key]
        if self.aliases.get(key) in self.values:
            return self.values[self.aliases[key]]
        raise DataError(
            f"config.json of a {self.values.get('model_type')} has no {key}",
            fix="give the config.json that belongs to the model",
            where=self.where,
        )

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of `key`, or `default` where it is absent or null."""
        value = self.values.get(key, self.values.get(self.aliases.get(key, key)))
        return default if value is None else value

    @property
    def context(self) -> int:
        """How many positions the model was made for; 2048 where alibi needs no number and none is written."""
        keys = ("max_position_embeddings", "max_seq_len", "seq_length")
        return int(next((value for key in keys if (value := self.get(key)) is not None), 2048))

    def refuse(self, key: str, reason: str) -> RecipeError:
        """Return the error for a key that the graph builder cannot honour."""
        return RecipeError(
            f"config.json sets {key} to {repr(self.get(key))[:100]}: {reason}",
            fix="export --format hf or dense instead, or describe it in soco_export/onnx/families",
            where=f"{self.where}: {key}",
        )

    def require(self, key: str, allowed: tuple[Any, ...]) -> None:
        """Raise unless `key` is absent or has one of the `allowed` values."""
        if self.get(key, allowed[0]) not in allowed:
            raise self.refuse(key, f"the graph builder knows only {', '.join(map(repr, allowed))}")


def resolve_config(folder: Path, trust_remote_code: bool = False) -> Config:
    """Read `folder`/config.json; DataError if it is missing, no configuration, or one of code that may not run.

    Of a model that reads images or sounds as well it is that of its decoder.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    written = read_fields(folder)
    inner = language_model(written)
    with making_a_model(folder):
        if inner is None:
            resolved = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        else:
            resolved, written = decoder_config(inner), inner
    # transformers 4 drops the newer way of writing rope: what is written wins there. 5 fills its tables in.
    filled = getattr(resolved, "rope_parameters", None)
    keys = () if filled else ("rope_parameters", "rope_theta", "rope_scaling")
    return as_config(resolved, str(path), {key: written[key] for key in keys if written.get(key)})


def as_config(resolved: Any, where: str, written: Mapping[str, Any] | None = None) -> Config:
    """Return a transformers config as a `Config`; `written`: keys as the file has them, which win."""
    from transformers import PretrainedConfig

    shared = frozenset(PretrainedConfig().to_dict())
    aliases = dict(getattr(resolved, "attribute_map", {}))
    return Config({**resolved.to_dict(), **(written or {})}, type(resolved)().to_dict(), shared, where, aliases)
