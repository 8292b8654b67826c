"""BLOOM and MPT: a bias by distance (alibi) instead of positions."""

from __future__ import annotations

import math

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
from soco_export.onnx.families.registry import family

_BIAS_MAX = 8  # transformers' MPT takes this number, whatever attn_config.alibi_bias_max says


def bloom_slopes(heads: int) -> tuple[float, ...]:
    """Return alibi's slopes; heads beyond a power of two get every other one of the next. Source: arXiv 2108.12409."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    between = [2 ** (-4 * (2 * head + 1) / power) for head in range(heads - power)]
    return tuple(slopes + between)


def mpt_slopes(heads: int) -> tuple[float, ...]:
    """Return alibi's slopes as MPT orders them where heads are no power of two."""
    power = 1 << math.ceil(math.log2(heads))
    slopes = [2 ** (-_BIAS_MAX * (head + 1) / power) for head in range(power)]
    return tuple(slopes if power == heads else (slopes[1::2] + slopes[::2])[:heads])


@family(
    "bloom",
    keys="""hidden_size n_embed n_layer n_head num_attention_heads layer_norm_epsilon slow_but_exact
    apply_residual_connection_post_layernorm seq_length attention_softmax_in_fp32 bias_dropout_fusion
    masked_softmax_fusion offset_alibi skip_bias_add skip_bias_add_qkv""",
)
def bloom(config: Config) -> Architecture:
    """A norm behind the embedding, one projection stored head by head, biases everywhere but in the head."""
    config.require("apply_residual_connection_post_layernorm", (False,))
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    fused, output = ("self_attention.query_key_value",), "self_attention.dense"
    return Architecture(
        family="bloom",
        hidden=hidden,
        vocab=config["vocab_size"],
        context=config.context,
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=Norm("layer", config["layer_norm_epsilon"], bias=True),
        attention=Attention(heads, heads, hidden // heads, fused, output, groups=heads, alibi=bloom_slopes(heads)),
        mlp=Mlp(4 * hidden, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", "gelu_tanh"),
        residual=Residual(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
        tensors=Tensors(
            embed="transformer.word_embeddings",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}",
            embedding_norm="transformer.word_embeddings_layernorm",
        ),
        each=(Layer(),) * config["num_hidden_layers"],
    )


@family(
    "mpt",
    keys="""d_model n_heads n_layers expansion_ratio max_seq_len layer_norm_epsilon attn_config learned_pos_emb no_bias
    norm_type embedding_fraction logit_scale verbose fc_type ffn_config init_config tokenizer_name""",
)
def mpt(config: Config) -> Architecture:
    """LayerNorm without bias; of `attn_config` the scale and the clipping are read."""
    config.require("expansion_ratio", (4,))
    config.require("logit_scale", (None,))
    how, hidden, heads = config["attn_config"], config["hidden_size"], config["num_attention_heads"]
    for key, value in (("alibi", True), ("qk_ln", False), ("prefix_lm", False), ("attn_type", "multihead_attention")):
        if how.get(key, value) != value:
            raise config.refuse("attn_config", f"{key} {how[key]!r} is not described")
    return Architecture(
        family="mpt",
        hidden=hidden,
        vocab=config["vocab_size"],
        context=config.context,
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=Norm("layer", config["layer_norm_epsilon"]),
        attention=Attention(
            heads,
            heads,
            hidden // heads,
            ("attn.Wqkv",),
            "attn.out_proj",
            scale=how.get("softmax_scale"),
            clip=how.get("clip_qkv"),
            alibi=mpt_slopes(heads),
        ),
        mlp=Mlp(4 * hidden, ("ffn.up_proj",), "ffn.down_proj", "gelu"),
        residual=Residual(before_attention="norm_1", before_mlp="norm_2"),
        tensors=Tensors(embed="transformer.wte", final_norm="transformer.norm_f", layer="transformer.blocks.{}"),
        each=(Layer(),) * config["num_hidden_layers"],
    )
