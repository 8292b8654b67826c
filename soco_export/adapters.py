"""PEFT's LoRA on a pruned layer, by the name that the dense layer had: the adapter goes on the factor of the outputs.

PEFT's defaults name projections (`q_proj`, `v_proj`), which are pairs of matrices here, and PEFT adapts only modules
that it knows. On `up` (or `mix` of a pivoted layer), an ordinary Linear, merging is exact and keeps the rank, so the
merged model is saved and exported like any other.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import nn

from soco_train.errors import RecipeError
from soco_train.forms.base import FactoredLinear


def register_adapters(lora: ModuleType) -> None:
    """Teach `peft.tuners.lora.model` about pruned layers, once."""
    known = lora.dispatch_default
    if getattr(known, "takes_pruned_layers", False):
        return

    def dispatch_default(target: nn.Module, adapter_name: str, **options: Any) -> nn.Module | None:
        if not isinstance(target, FactoredLinear) or options.get("parameter_name"):
            found: nn.Module | None = known(target, adapter_name, **options)
            return found
        name, factor = _factor(target)
        setattr(target, name, known(factor, adapter_name, **options))
        return target

    dispatch_default.takes_pruned_layers = True  # type: ignore[attr-defined]
    lora.dispatch_default = dispatch_default  # type: ignore[attr-defined]


def _factor(layer: FactoredLinear) -> tuple[str, nn.Linear]:
    """Return the Linear that makes the outputs of a pruned layer, with its name in it."""
    for name, module in layer.named_children():
        if isinstance(module, nn.Linear):
            return name, module
    raise RecipeError(
        "a pruned layer has an adapter already, and PEFT is to add another one",
        fix="merge the first (merge_and_unload), or name the factors: target_modules=['up', 'mix']",
        where="LoraConfig.target_modules",
    )
