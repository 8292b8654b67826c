"""Parts that most families share: the reading of sizes, activations, windows, and Llama's names.

`decoder` is Llama's block for whatever config; a family replaces the parts in which it differs.
"""

from __future__ import annotations

from collections.abc import Sequence

from soco_export.files.json import check_window
from soco_export.onnx.describe.architecture import (
    Activation,
    Architecture,
    Attention,
    Layer,
    Mlp,
    Norm,
    Residual,
    Tensors,
)
from soco_export.onnx.describe.config import Config
from soco_export.onnx.describe.rope import read_rope

ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
ROPE = "max_position_embeddings rope_parameters rope_theta rope_scaling original_max_position_embeddings"
SIZES = f"""hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act
    {ROPE}"""
COMMON = f"{SIZES} rms_norm_eps attention_bias mlp_bias"
LAYER_NORM = f"{SIZES} layer_norm_eps attention_bias mlp_bias"
ONE_WINDOW = "sliding_window use_sliding_window max_window_layers"  # of all layers or of none
WINDOWS = f"{ONE_WINDOW} layer_types"

LLAMA = Tensors(embed="model.embed_tokens", final_norm="model.norm", layer="model.layers.{}")
PRE_NORM = Residual(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
POST_NORM = Residual(after_attention="post_attention_layernorm", after_mlp="post_feedforward_layernorm")


def activation(config: Config, key: str) -> Activation:
    """Return the activation that `key` names."""
    if config[key] not in ACTIVATIONS:
        raise config.refuse(key, f"not one of {', '.join(sorted(ACTIVATIONS))}")
    return ACTIVATIONS[config[key]]


def head_size(config: Config) -> int:
    """Return head_dim, hidden_size / heads where it is not written."""
    return int(config.get("head_dim", config["hidden_size"] // config["num_attention_heads"]))


def layer_kinds(config: Config) -> list[str]:
    """Return for each layer whether its attention is `full_attention` or `sliding_attention`."""
    layers = config["num_hidden_layers"]
    kind = "full_attention" if config.get("sliding_window") is None else "sliding_attention"
    kinds = list(config.get("layer_types", [kind] * layers))
    unknown = set(kinds) - {"full_attention", "sliding_attention"}
    if unknown or len(kinds) != layers:
        raise config.refuse("layer_types", f"{sorted(unknown) or len(kinds)} is not described")
    check_window(kinds, config.get("sliding_window"), config.where)
    return kinds


def windows(config: Config) -> list[int | None]:
    """Return for each layer how many keys a query sees."""
    return [config.get("sliding_window") if kind == "sliding_attention" else None for kind in layer_kinds(config)]


def layers(config: Config, interleaved: bool = False, turning: Sequence[bool] | None = None) -> tuple[Layer, ...]:
    """Return all layers with the window and the rotation that the config gives them; `turning`: which rotate at all."""
    kinds, size = layer_kinds(config), head_size(config)
    ropes = {kind: read_rope(config, size, kind, interleaved) for kind in dict.fromkeys(kinds)}
    turns = turning or [True] * len(kinds)
    return tuple(
        Layer(window, ropes[kind] if turn else None)
        for window, kind, turn in zip(windows(config), kinds, turns, strict=True)
    )


def attention(config: Config) -> Attention:
    """Return grouped-query attention under Llama's names."""
    heads = config["num_attention_heads"]
    return Attention(
        heads=heads,
        kv_heads=config.get("num_key_value_heads", heads),
        head_dim=head_size(config),
        inputs=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        output="self_attn.o_proj",
    )


def gated_mlp(config: Config, act: str = "hidden_act") -> Mlp:
    """Return a gated MLP under Llama's names."""
    inputs = ("mlp.gate_proj", "mlp.up_proj")
    return Mlp(config["intermediate_size"], inputs, "mlp.down_proj", activation(config, act), gated=True)


def decoder(
    config: Config, norm: Norm | None = None, mlp: Mlp | None = None, each: tuple[Layer, ...] | None = None
) -> Architecture:
    """Return Llama's block: RMSNorm before attention and MLP, rotary positions, gated MLP."""
    return Architecture(
        family=config["model_type"],
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", False)),
        norm=norm or Norm("rms", config["rms_norm_eps"]),
        attention=attention(config),
        mlp=mlp or gated_mlp(config),
        residual=PRE_NORM,
        tensors=LLAMA,
        each=layers(config) if each is None else each,
    )
