"""The model card of a run's checkpoint: the recipe that made it, without places of this machine, and what was measured."""

from __future__ import annotations

from typing import Any

from soco_export.recipe import Recipe, lock


def model_card(recipe: Recipe, model: Any) -> str:
    """Return the README.md of `model`, pruned by `recipe`, before anything is measured."""
    from soco_export.checkpoint import render_card, summarise

    return render_card(lock(recipe), None, summarise(model, recipe.model.id or recipe.name))
