"""One folder that transformers 4.57 and 5 both read the same way.

Version 5 writes rotary settings, tokenizer class and special tokens in forms that 4.57 ignores or refuses (rope_theta
falls back to 10000 without a word), so each is written in both forms. The functions are pure: dict in, dict out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PLAIN_ROPE = "default"
# what a rotation's numbers are called where a class has names of its own for them
_NEOX = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
_OWN_NAMES = {"gpt_neox": _NEOX, "gpt_neox_japanese": _NEOX}


def config_in_both_forms(config: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return config.json with each setting where either version looks for it.

    `tied` says whether the head shares the embedding: the versions have different defaults for it.
    """
    both = dict(config)
    dtype = both.get("dtype") or both.get("torch_dtype")
    if dtype is not None:
        both["dtype"] = both["torch_dtype"] = dtype
    both["tie_word_embeddings"] = tied
    both.update(older_rope(both.get("rope_parameters") or {}, both.get("model_type")))
    if "num_local_experts" in both:  # as version 5 writes it of Qwen3 too, which is num_experts to 4.57
        both.setdefault("num_experts", both["num_local_experts"])
    return both


def older_rope(rope: Mapping[str, Any], kind: str | None) -> dict[str, Any]:
    """Return rope_theta, partial_rotary_factor and rope_scaling as 4.57 has them, beside `rope_parameters`.

    kind: the model_type, whose class may have other names for them.
    """
    if any(isinstance(value, Mapping) for value in rope.values()):
        return _older_layered_rope(rope)
    older = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    if rope.get("rope_type", PLAIN_ROPE) != PLAIN_ROPE:
        older["rope_scaling"] = {key: value for key, value in rope.items() if key not in older}
    return older | {name: older[key] for key, name in _OWN_NAMES.get(str(kind), {}).items() if key in older}


def _older_layered_rope(rope: Mapping[str, Any]) -> dict[str, Any]:
    """Translate settings that differ by attention type: 4.57 has a base for full and one for local attention."""
    older = older_rope(rope.get("full_attention") or {}, None)
    local = rope.get("sliding_attention") or {}
    if "rope_theta" in local:
        older["rope_local_base_freq"] = local["rope_theta"]
    return older


def tokenizer_in_both_forms(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return tokenizer_config.json of a tokenizer that has a tokenizer.json, as both versions read it.

    The class becomes the generic one, which takes tokenizer.json as it is; a model's own class would rebuild parts of
    it, differently in each version. Extra special tokens are a list in 5 and a dict in 4.57: only their older name
    means the same in both.
    """
    both = dict(settings)
    both["tokenizer_class"] = "PreTrainedTokenizerFast"
    extra = both.get("extra_special_tokens")
    if isinstance(extra, list):
        del both["extra_special_tokens"]
        both["additional_special_tokens"] = extra
    # 4.57's generic class would add token_type_ids, which no decoder takes.
    both.setdefault("model_input_names", ["input_ids", "attention_mask"])
    return both
