"""Settings in the form of both transformers versions."""

from __future__ import annotations

import pytest

from soco_export.checkpoint.versions import config_in_both_forms, tokenizer_in_both_forms

pytestmark = pytest.mark.transformers


def test_plain_rope() -> None:
    config = {"dtype": "bfloat16", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}
    both = config_in_both_forms(config, tied=False)
    assert both == {**config, "torch_dtype": "bfloat16", "rope_theta": 5e5, "tie_word_embeddings": False}


def test_scaled_rope_and_partial_rotation() -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    rope = {"rope_theta": 1e6, "partial_rotary_factor": 0.5, **scaling}
    both = config_in_both_forms({"rope_parameters": rope}, tied=True)
    assert both["rope_parameters"] == rope
    assert both["rope_scaling"] == scaling
    assert (both["rope_theta"], both["partial_rotary_factor"], both["tie_word_embeddings"]) == (1e6, 0.5, True)


def test_rope_by_attention_type() -> None:
    rope = {
        "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    }
    both = config_in_both_forms({"rope_parameters": rope}, tied=True)
    assert both["rope_theta"] == 1e6
    assert both["rope_local_base_freq"] == 1e4
    assert both["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}


def test_an_older_config_keeps_its_settings() -> None:
    older = {"torch_dtype": "float16", "rope_theta": 77.0, "rope_scaling": None}
    both = config_in_both_forms(older, tied=False)
    assert both == {**older, "dtype": "float16", "tie_word_embeddings": False}


def test_tokenizer() -> None:
    newer = {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"], "eos_token": "</s>"}
    assert tokenizer_in_both_forms(newer) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
        "eos_token": "</s>",
        "model_input_names": ["input_ids", "attention_mask"],
    }
    older = {"tokenizer_class": "LlamaTokenizerFast", "extra_special_tokens": {"image": "<i>"}}
    assert tokenizer_in_both_forms(older)["extra_special_tokens"] == {"image": "<i>"}
    own = {"model_input_names": ["input_ids"]}
    assert tokenizer_in_both_forms(own)["model_input_names"] == ["input_ids"]
