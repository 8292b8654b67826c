"""Llama and the families that differ from it by a key: Mistral, Qwen2, Qwen3."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import Architecture, Names, Norm
from soco_export.onnx.describe.config import Config, activation
from soco_export.onnx.describe.rope import inverse_frequencies
from soco_export.onnx.families.registry import family

SIZES = "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim"
ROPE = "max_position_embeddings rope_parameters rope_theta rope_scaling partial_rotary_factor"
COMMON = f"{SIZES} {ROPE} hidden_act rms_norm_eps"
WINDOWS = "sliding_window use_sliding_window max_window_layers layer_types"


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
        activation=activation(config, "hidden_act"),
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
