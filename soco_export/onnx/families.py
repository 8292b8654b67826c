"""The one place that knows model families. A new one is one decorated function: its config, as an `Architecture`.

A config key that would change the mathematics and is not part of the description is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from soco_export.onnx.architecture import FAMILIES, Activation, Architecture, Config, Names, Norm, family
from soco_export.onnx.rope import inverse_frequencies

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
ROPE = "max_position_embeddings rope_parameters rope_theta rope_scaling partial_rotary_factor"
COMMON = f"{SIZES} {ROPE} hidden_act rms_norm_eps"
WINDOWS = "sliding_window use_sliding_window max_window_layers layer_types"

# Keys that never change what the forward pass computes at inference.
HARMLESS = """architectures attention_dropout auto_map bos_token_id dropout dtype eos_token_id init_std
    initializer_range layerdrop pad_token_id pretraining_tp quantization_config tie_word_embeddings torch_dtype
    use_cache vocab_size"""
# Keys that no config class declares are only looked at if they smell of mathematics; the rest is somebody's note.
SUSPICIOUS = re.compile(
    r"scal|cap|bias|norm|rotary|rope|window|multipl|factor|logit|attn|attention|alibi|residual|expert"
)


def describe(config: Config) -> Architecture | None:
    """Return the description of `config`, None if its family has none.

    Raises RecipeError for a key that changes the mathematics and that the family's description does not understand.
    """
    entry = FAMILIES.get(str(config.get("model_type")))
    if entry is None:
        return None
    describer, understood = entry
    known = understood | config.shared | frozenset(HARMLESS.split())
    for key, value in config.values.items():
        if key not in known and _matters(key, value, config.defaults):
            raise config.refuse(key, f"the description of {config['model_type']} does not know it")
    return describer(config)


def _matters(key: str, value: Any, defaults: Mapping[str, Any]) -> bool:
    if value is None or value is False or value in ("", [], {}):
        return False
    if key in defaults:
        return bool(value != defaults[key])
    return SUSPICIOUS.search(key) is not None


def _activation(config: Config, key: str) -> Activation:
    if config[key] not in ACTIVATIONS:
        raise config.refuse(key, f"not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[config[key]]


def _windows(config: Config, layers: int) -> tuple[int | None, ...]:
    window = config.get("sliding_window")
    kinds = config.get("layer_types", ["sliding_attention" if window else "full_attention"] * layers)
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise config.refuse("layer_types", f"{sorted(unknown) or len(kinds)} is not described")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _llama_names(qk_norm: bool) -> Names:
    return Names(
        embed="model.embed_tokens",
        final_norm="model.norm",
        layer="model.layers.{}",
        attention_norm="input_layernorm",
        mlp_norm="post_attention_layernorm",
        query="self_attn.q_proj",
        key="self_attn.k_proj",
        value="self_attn.v_proj",
        output="self_attn.o_proj",
        mlp_in=("mlp.gate_proj", "mlp.up_proj"),
        mlp_out="mlp.down_proj",
        query_norm="self_attn.q_norm" if qk_norm else None,
        key_norm="self_attn.k_norm" if qk_norm else None,
    )


def _llama_like(config: Config, qk_norm: bool = False) -> Architecture:
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    head_dim = config.get("head_dim", config["hidden_size"] // heads)
    return Architecture(
        family=config["model_type"],
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        layers=layers,
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        norm=Norm("rms", config["rms_norm_eps"]),
        activation=_activation(config, "hidden_act"),
        windows=_windows(config, layers),
        tied=bool(config.get("tie_word_embeddings", False)),
        names=_llama_names(qk_norm),
        rope=inverse_frequencies(config, head_dim),
    )


# Biases need no key of their own: a Linear has one exactly where the checkpoint stores one.
@family("llama", keys=f"{COMMON} attention_bias mlp_bias is_llama_config")
@family("mistral", "qwen2", keys=f"{COMMON} {WINDOWS}")
def llama(config: Config) -> Architecture:
    """RMSNorm, rotary positions, gated MLP."""
    return _llama_like(config)


@family("qwen3", keys=f"{COMMON} {WINDOWS} attention_bias")
def qwen3(config: Config) -> Architecture:
    """Llama with RMSNorm on each head's query and key."""
    return _llama_like(config, qk_norm=True)


@family(
    "opt",
    keys="""hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings word_embed_proj_dim
    do_layer_norm_before _remove_final_layer_norm activation_function enable_bias layer_norm_elementwise_affine""",
)
def opt(config: Config) -> Architecture:
    """LayerNorm, learned positions, plain MLP, biases everywhere."""
    config.require("do_layer_norm_before", (True,))
    config.require("_remove_final_layer_norm", (False,))
    config.require("layer_norm_elementwise_affine", (True,))
    config.require("word_embed_proj_dim", (config["hidden_size"],))
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    return Architecture(
        family="opt",
        hidden=config["hidden_size"],
        intermediate=config["ffn_dim"],
        layers=layers,
        heads=heads,
        kv_heads=heads,
        head_dim=config["hidden_size"] // heads,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        norm=Norm("layer", 1e-5),
        activation=_activation(config, "activation_function"),
        windows=(None,) * layers,
        tied=bool(config.get("tie_word_embeddings", True)),
        names=Names(
            embed="model.decoder.embed_tokens",
            positions="model.decoder.embed_positions",
            final_norm="model.decoder.final_layer_norm",
            layer="model.decoder.layers.{}",
            attention_norm="self_attn_layer_norm",
            mlp_norm="final_layer_norm",
            query="self_attn.q_proj",
            key="self_attn.k_proj",
            value="self_attn.v_proj",
            output="self_attn.out_proj",
            mlp_in=("fc1",),
            mlp_out="fc2",
        ),
        position_offset=2,
    )
