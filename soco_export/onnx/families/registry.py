"""The described families: which function reads which model type, and which config keys it understands."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_train.errors import DataError

Describe = Callable[[Config], Architecture]
FAMILIES: dict[str, tuple[Describe, frozenset[str]]] = {}

# Keys that never change what the forward pass computes at inference.
HARMLESS = """architectures attention_dropout attn_pdrop
    auto_map bos_token_id classifier_dropout dropout dtype embd_pdrop
    embed_dropout embedding_dropout emb_pdrop eos_token_id hidden_dropout init_device init_std initializer_range
    initializer_cutoff_factor use_flash_attention_2 _flash_attn_2_enabled use_flash_attn use_flash_attention
    layerdrop pad_token_id pretraining_tp quantization_config resid_dropout resid_pdrop residual_dropout sep_token_id
    attention_probs_dropout_prob hidden_dropout_prob
    summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj tie_word_embeddings
    torch_dtype use_cache vocab_size _attn_implementation_autoset attn_implementation _attn_implementation"""
# Keys that no config class declares matter only if their names speak of mathematics; the rest is somebody's note.
SUSPICIOUS = re.compile(
    r"scal|cap|bias|norm|rotary|rope|window|multipl|factor|logit|attn|attention|alibi|residual|expert"
)
# What a family names among its keys if its rotation is written for each kind of layer apart, or turns a part of a head:
# other classes pass over both.
KINDS = ("sliding_attention", "full_attention")
EACH_KIND = " ".join(KINDS)
PART = "partial_rotary_factor"


def family(*model_types: str, keys: str) -> Callable[[Describe], Describe]:
    """Register a description for `model_types`; `keys` are the config keys that it understands, separated by spaces."""

    def register(describe: Describe) -> Describe:
        for model_type in model_types:
            FAMILIES[model_type] = (describe, frozenset(keys.split()))
        return describe

    return register


def describe(config: Config) -> Architecture | None:
    """Return the description of `config`, None if its family has none.

    Raises RecipeError for a key that changes the mathematics and that the family's description does not understand,
    DataError for fields from which it cannot be made.
    """
    entry = FAMILIES.get(str(config.get("model_type")))
    if entry is None:
        return None
    describer, understood = entry
    known = understood | config.shared | {PART} | frozenset(HARMLESS.split())
    for key, value in config.values.items():
        if key not in known and _matters(key, value, config.defaults):
            raise config.refuse(key, f"the description of {config['model_type']} does not know it")
    try:
        _check_rotation(config, understood)
        _check_kinds(config, understood)
        return describer(config)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise DataError(
            f"config.json describes no graph of a {config['model_type']}: {type(error).__name__}, {str(error)[:200]}",
            fix="give the config.json that was published with the model; --format hf or dense needs no description",
            where=config.where,
        ) from error


def _matters(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return False
    if key in defaults:
        return bool(value != defaults[key])
    return SUSPICIOUS.search(key) is not None


def _check_rotation(config: Config, understood: frozenset[str]) -> None:
    """Raise RecipeError for a rotation that the class of the model would not read as it is written."""
    written = config.get("rope_parameters", {})
    inner = [table for table in written.values() if isinstance(table, Mapping)]
    if inner and not understood.issuperset(KINDS):
        raise config.refuse("rope_parameters", f"a {config['model_type']} has one rotation for all of its layers")
    said = {key for key, value in written.items() if value not in (None, "default")}
    if understood.issuperset(KINDS) and (beside := sorted(said - {*KINDS, "truncate"})):
        raise config.refuse("rope_parameters", f"{beside[0]} is not in the table of a kind of layers")
    tables = (config, config.get("rope_scaling", {}), written, *inner)
    if PART not in understood and (parts := {table.get(PART) for table in tables} - {None, 1}):
        raise config.refuse("rope_parameters", f"a {config['model_type']} turns whole heads, not {max(parts)} of each")


def _check_kinds(config: Config, understood: frozenset[str]) -> None:
    """Raise RecipeError for kinds of layers where the class has one for all of them."""
    kind = KINDS[config.get("sliding_window") is None]
    if "layer_types" not in understood and set(config.get("layer_types", [])) - {kind}:
        raise config.refuse("layer_types", f"in a {config['model_type']} all layers are of {kind}")
