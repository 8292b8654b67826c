"""How transformers builds a pruned model from its folder: a registered quantizer, no remote code.

transformers calls it between making the model on the meta device and reading the weights, which is when the pruned
Linears are swapped for factored modules of the recorded ranks. Afterwards nothing of it stays on the model: low rank
is not a quantisation, and such a model may be cast, trained, adapted and saved like any other.

This module is imported while transformers is still importing itself, so it takes only what is ready by then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from soco_export.checkpoint.layers import factored_layers, open_mixtures_of
from soco_export.checkpoint.reader import check_layer_tensors, checked_record
from soco_export.checkpoint.record import FORMAT, INSTALL, quantization_record
from soco_export.files.safetensors import open_shards
from soco_train.errors import DataError
from soco_train.forms.base import FORMS
from soco_train.forms.registry import from_factors
from soco_train.modules.experts import open_mixtures
from soco_train.modules.layers import replace_module
from soco_train.modules.sites import as_linear


class SocoExportConfig(QuantizationConfigMixin):
    """The `quantization_config` of a checkpoint's config.json: which layers are pruned, how, and to which rank."""

    def __init__(self, layers: dict[str, dict[str, Any]], format: int = FORMAT, **_derived: Any) -> None:
        if format != FORMAT:
            raise DataError(
                f"the checkpoint is of format {format}, this soco-export reads format {FORMAT}",
                fix=f"{INSTALL} --upgrade",
                where="config.json: quantization_config.format",
            )
        checked_record(layers)
        # transformers serialises the attributes as they are, so they are the record itself.
        self.__dict__.update(quantization_record(layers))


class SocoExportQuantizer(HfQuantizer):
    """Puts factored modules where the record says, on the meta device, before the weights are read."""

    requires_calibration = True  # transformers alone cannot turn a dense model into this one

    def _convert_model_for_quantization(self, model: nn.Module) -> None:
        """Nothing to patch for us; transformers 4.57 would demand accelerate here."""

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, **_context: Any
    ) -> nn.Module:
        layers: dict[str, dict[str, Any]] = self.quantization_config.layers
        open_mixtures_of(model, layers)
        modules = dict(model.named_modules())
        for name, layer in layers.items():
            place = _place(name, modules, str(getattr(model, "base_model_prefix", "")))
            replace_module(model, place, _empty_like(modules[place], name, layer))
        # transformers 5 says which files it will read. A tensor missing there would be left uninitialised.
        if checkpoint_files and all(str(file).endswith(".safetensors") for file in checkpoint_files):
            check_layer_tensors(open_shards(checkpoint_files), layers)
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Return what transformers 5 does to the files' tensors: nothing, where experts are open and stored so."""
        return [] if any(open_mixtures(model)) else weight_conversions

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuse a checkpoint without one of our tensors (transformers 4.57 asks here)."""
        pruned = tuple(f"{name}." for name in factored_layers(model))
        lost = [key for key in missing_keys if key.startswith(pruned)]
        if lost:
            raise DataError(
                f"the checkpoint lacks {lost[0]} ({len(lost)} tensors of pruned layers in all)",
                fix="copy or write the checkpoint again",
                where=lost[0],
            )
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **_context: Any) -> Any:
        del model.hf_quantizer
        model.is_quantized = False
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Say that `save_pretrained` may write the model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that adapters may be trained on the model."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Say that the model's own weights may be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Say that torch.compile may take the model."""
        return True


def _place(name: str, modules: dict[str, nn.Module], prefix: str) -> str:
    """Return where layer `name` is in this model, which may be the base model of the one that was saved."""
    for place in (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}"):
        if place in modules and as_linear(modules[place]) is not None:
            return place
    raise DataError(
        f"the checkpoint has pruned {name}, but the model has no such layer there",
        fix="load it with the class that config.json names under architectures"
        + ("; transformers 5 and 4.57 have other names for some mixtures' experts" if ".experts." in name else ""),
        where=f"config.json: quantization_config.layers.{name}",
    )


def _empty_like(replaced: nn.Module, name: str, layer: dict[str, Any]) -> nn.Module:
    linear = as_linear(replaced)
    assert linear is not None
    sizes = linear.out_features, linear.in_features
    if layer["rank"] >= FORMS[layer["kind"]].module.full_rank(*sizes):
        raise DataError(
            f"the record of {name} says rank {layer['rank']} for a layer of {sizes[0]} outputs, {sizes[1]} inputs",
            fix="write the checkpoint again",
            where=f"config.json: quantization_config.layers.{name}",
        )
    numbers = FORMS[layer["kind"]].blank(*sizes, layer["rank"], layer["bias"])
    factored = from_factors(numbers, linear.weight.dtype, "meta")
    factored.stands_for = type(replaced)
    return factored.train(replaced.training)
