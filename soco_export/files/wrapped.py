"""A folder that holds a decoder among other models: its part of config.json, and its tensors under its own names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from copy import deepcopy
from typing import Any

from soco_export.files.json import making_a_model
from soco_export.files.rope import TABLES

# what must agree for a folder to be a recipe's model
MODEL_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# what a config.json of several models may say of its language model outside
_SHARED = ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
# how files of several models call the decoder among them, and what transformers calls it alone; the first that fits
_INSIDE = (
    ("language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)
# decoders that are another type once all they read is text: their three kinds of positions are one then
_ALONE = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}


def language_model(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the fields of the decoder inside a config.json of several models, None if it is of one.

    Such a file leaves out what its class says already: sizes that a recipe is compared with are filled in.
    """
    inner = _as_text(fields)
    if inner is None:
        return None
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as DECODERS

    if inner["model_type"] not in DECODERS:
        return None
    inner = {**{key: fields[key] for key in _SHARED if key in fields}, **inner}
    if fields.get("tie_word_embeddings"):  # the head may be the whole's, whatever the part says
        inner["tie_word_embeddings"] = True
    with making_a_model("model.architecture"):
        filled = decoder_config(inner)
    return {**inner, **{key: getattr(filled, key) for key in MODEL_SIZES if key not in inner and hasattr(filled, key)}}


def decoder_config(fields: Mapping[str, Any]) -> Any:
    """Return the config of a decoder with these `fields`, which stay as they are: transformers writes into tables."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**deepcopy(dict(fields)))


def _as_text(fields: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the decoder's own fields, as of a model that reads nothing but text."""
    inner, flat = fields.get("text_config"), f"{fields.get('model_type')}_text"
    if inner is None and flat in _ALONE and "vision_config" in fields:  # as these were first published
        inner = {**fields, "model_type": flat}
        del inner["vision_config"]
    if not isinstance(inner, Mapping) or not isinstance(inner.get("model_type"), str):
        return None
    kind = inner["model_type"]
    if kind not in _ALONE:
        return dict(inner)
    ropes = {key: _plain_rope(inner[key]) for key in TABLES if inner.get(key)}
    return {**inner, **ropes, "model_type": _ALONE[kind]}


def _plain_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table of rotation without what tells rows, columns and frames of an image apart."""
    plain = {key: value for key, value in rope.items() if not key.startswith("mrope_")}
    return {key: "default" if value == "mrope" else value for key, value in plain.items()}


def left_behind(fields: Mapping[str, Any]) -> list[str]:
    """Return a line that says what a config.json of several models has beside its decoder; none if it is of one."""
    inner = language_model(fields)
    if inner is None:
        return []
    whole = fields.get("model_type")
    return [f"of the {whole} model the decoder alone is taken ({inner['model_type']}): it reads text only"]


def language_names(names: Collection[str]) -> dict[str, str]:
    """Return the decoder's tensors in files of several models → their names in it alone; empty for files of one."""
    if any(name.startswith("visual.") for name in names):
        return {name: name for name in names if name.startswith(("model.", "lm_head."))}
    if not any("language_model." in name for name in names):
        return {}
    fitting = {name: next((pair for pair in _INSIDE if name.startswith(pair[0])), None) for name in names}
    return {name: pair[1] + name.removeprefix(pair[0]) for name, pair in fitting.items() if pair}
