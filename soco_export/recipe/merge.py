"""Recipes laid over one another: deep merge, dotted keys, `key=value` overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from soco_export.recipe.yaml import Origins, read_yaml_value
from soco_train.errors import RecipeError

TEXT_SOURCES = ("path", "hub", "builtin")


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep-merge two mappings; a text source in `above` displaces the other kinds of source in `below`."""
    merged = dict(below)
    if any(above.get(source) is not None for source in TEXT_SOURCES):
        merged = {key: value for key, value in merged.items() if key not in TEXT_SOURCES}
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Origins]:
    """Return nested values with each `key=value` laid over them, and where these keys were written."""
    changed, origins = dict(values), {}
    for override in overrides:
        key, value = _parse_override(override)
        changed = merge(changed, _nested(key, value))
        origins[key] = f"--set {override}"
    return changed, origins


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"cannot read the override {override!r}", fix="write --set key=value", where="--set")
    return key.strip(), read_yaml_value(text, f"--set {override}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def with_key(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set one dotted key, the whole of it."""
    head, _, rest = key.partition(".")
    return {**values, head: with_key(values.get(head) or {}, rest, value) if rest else value}
