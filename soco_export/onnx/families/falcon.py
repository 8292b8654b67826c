"""Falcon: one projection in as many groups as there are key heads, attention and MLP mostly in parallel."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import (
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
from soco_export.onnx.families.parts import ROPE, activation
from soco_export.onnx.families.registry import family


@family(
    "falcon",
    keys=f"""hidden_size num_hidden_layers num_attention_heads num_ln_in_parallel_attn layer_norm_epsilon num_kv_heads
    alibi new_decoder_architecture multi_query parallel_attn bias ffn_hidden_size ff_factor activation {ROPE}""",
)
def falcon(config: Config) -> Architecture:
    """The 7B, 40B and 11B layouts; alibi (the RW models) is refused: transformers rounds it to bfloat16."""
    config.require("alibi", (False,))
    hidden, heads, modern = config["hidden_size"], config["num_attention_heads"], config["new_decoder_architecture"]
    single = config["multi_query"] and not modern
    kept = config["num_kv_heads"] if modern else 1 if single else heads
    size = hidden // heads
    return Architecture(
        family="falcon",
        hidden=hidden,
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=Norm("layer", config["layer_norm_epsilon"], bias=True),
        attention=Attention(
            heads, kept, size, ("self_attention.query_key_value",), "self_attention.dense", groups=kept
        ),
        mlp=Mlp(
            config.get("ffn_hidden_size", 4 * hidden),
            ("mlp.dense_h_to_4h",),
            "mlp.dense_4h_to_h",
            activation(config, "activation"),
        ),
        residual=_falcon_residual(config),
        tensors=Tensors(embed="transformer.word_embeddings", final_norm="transformer.ln_f", layer="transformer.h.{}"),
        each=(Layer(rope=read_rope(config, size)),) * config["num_hidden_layers"],
    )


def _falcon_residual(config: Config) -> Residual:
    modern = config["new_decoder_architecture"]
    if modern and config.get("num_ln_in_parallel_attn", 2) == 2:
        return Residual(before_attention="ln_attn", before_mlp="ln_mlp", parallel=True)
    if modern or config["parallel_attn"]:
        return Residual(before_attention="input_layernorm", parallel=True)
    return Residual(before_attention="input_layernorm", before_mlp="post_attention_layernorm")
