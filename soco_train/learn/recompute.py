"""Activation checkpointing for a frozen model in evaluation mode: memory for one more forward pass.

transformers recomputes a decoder layer only while it is in training mode, where some layers would also drop out. So the
layers themselves are put in training mode and nothing below them is, and their own dropout is set to zero meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from soco_train.errors import RecipeError


@contextmanager
def recomputing(model: Any, enabled: bool) -> Iterator[None]:
    """Within this context decoder layers keep only their inputs for the backward pass; RecipeError if they cannot."""
    if not enabled:
        yield
        return
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise RecipeError(
            f"{type(model).__name__} cannot recompute activations",
            fix="checkpoint_activations: false",
            where="recipe: train.checkpoint_activations and refine.distill.checkpoint_activations",
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
    dropouts = [(layer, layer.dropout) for layer in layers if isinstance(getattr(layer, "dropout", None), float)]
    try:
        for layer in layers:
            layer.training = True
        for layer, _ in dropouts:
            layer.dropout = 0.0
        yield
    finally:
        for layer, dropout in dropouts:
            layer.dropout = dropout
        model.gradient_checkpointing_disable()
        model.eval()
