"""In which keys two recipes differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soco_export.recipe.recipe import Recipe


def differences(one: Recipe, two: Recipe) -> list[str]:
    """Return the dotted keys in which two recipes differ."""
    flat_one, flat_two = (flatten(recipe.as_values()) for recipe in (one, two))
    return [key for key in {**flat_one, **flat_two} if flat_one.get(key) != flat_two.get(key)]


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as one, with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        inner = flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
        flat.update(inner)
    return flat
