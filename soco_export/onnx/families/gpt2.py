"""GPT-2 and what grew from it: learned positions, LayerNorm, plain MLP. GPT-Neo, GPT-BigCode (StarCoder), GPT-J."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import (
    Architecture,
    Attention,
    Layer,
    Mlp,
    Norm,
    Residual,
    Rope,
    Tensors,
)
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import activation
from soco_export.onnx.families.registry import family

KEYS = """n_positions n_embd n_layer n_head n_inner activation_function layer_norm_epsilon scale_attn_weights
    scale_attn_by_inverse_layer_idx reorder_and_upcast_attn n_ctx add_cross_attention task_specific_params
    scale_attention_softmax_in_fp32 attention_softmax_in_fp32"""


def _block(config: Config, attention: Attention, mlp: Mlp) -> Architecture:
    return Architecture(
        family=config["model_type"],
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=Norm("layer", config["layer_norm_epsilon"], bias=True),
        attention=attention,
        mlp=mlp,
        residual=Residual(before_attention="ln_1", before_mlp="ln_2"),
        tensors=Tensors(
            embed="transformer.wte",
            final_norm="transformer.ln_f",
            layer="transformer.h.{}",
            positions="transformer.wpe",
        ),
        each=(Layer(),) * config["num_hidden_layers"],
    )


def _attention(config: Config, inputs: tuple[str, ...], output: str) -> Attention:
    heads = config["num_attention_heads"]
    return Attention(heads, heads, config["hidden_size"] // heads, inputs, output)


def _mlp(config: Config, into: str, out: str, inner: str) -> Mlp:
    size = config.get(inner, 4 * config["hidden_size"])
    return Mlp(size, (f"mlp.{into}",), f"mlp.{out}", activation(config, "activation_function"))


@family("gpt2", keys=KEYS)
def gpt2(config: Config) -> Architecture:
    """Projections are stored transposed, queries, keys and values in one."""
    config.require("scale_attn_by_inverse_layer_idx", (False,))
    config.require("add_cross_attention", (False,))
    attention = _attention(config, ("attn.c_attn",), "attn.c_proj")
    attention = replace(attention, scale=None if config.get("scale_attn_weights", False) else 1.0)
    found = _block(config, attention, _mlp(config, "c_fc", "c_proj", "n_inner"))
    return replace(found, tensors=replace(found.tensors, transposed=True))


@family("gpt_bigcode", keys=f"{KEYS} multi_query num_key_value_heads")
def gpt_bigcode(config: Config) -> Architecture:
    """GPT-2 with one head of keys and values, stored as any Linear."""
    config.require("add_cross_attention", (False,))
    attention = _attention(config, ("attn.c_attn",), "attn.c_proj")
    shared = bool(config.get("multi_query", False))
    attention = replace(
        attention,
        kv_heads=1 if shared else attention.heads,
        groups=1 if shared else attention.heads,
        scale=None if config.get("scale_attn_weights", False) else 1.0,
    )
    return _block(config, attention, _mlp(config, "c_fc", "c_proj", "n_inner"))


@family(
    "gpt_neo",
    keys="""max_position_embeddings hidden_size num_layers attention_types num_heads intermediate_size window_size
    activation_function layer_norm_epsilon attention_layers""",
)
def gpt_neo(config: Config) -> Architecture:
    """Unscaled scores, windows in turn."""
    inputs = tuple(f"attn.attention.{name}_proj" for name in "qkv")
    attention = replace(_attention(config, inputs, "attn.attention.out_proj"), scale=1.0)
    found = _block(config, attention, _mlp(config, "c_fc", "c_proj", "intermediate_size"))
    kinds = [kind for group, times in config["attention_types"] for kind in group * times]
    if unknown := set(kinds) - {"global", "local"}:
        raise config.refuse("attention_types", f"{sorted(unknown)} is not described")
    windows = [config["window_size"] if kind == "local" else None for kind in kinds]
    return replace(found, each=tuple(Layer(window) for window in windows))


@family("gptj", keys=f"{KEYS} rotary_dim rotary")
def gptj(config: Config) -> Architecture:
    """Neighbouring pairs turn in a part of each head; attention and MLP read the same norm."""
    attention = _attention(config, tuple(f"attn.{name}_proj" for name in "qkv"), "attn.out_proj")
    found = _block(config, attention, _mlp(config, "fc_in", "fc_out", "n_inner"))
    width = config.get("rotary_dim", attention.head_dim)
    rope = Rope(tuple(10000.0 ** (-pair / width) for pair in range(0, width, 2)), interleaved=True)
    return replace(
        found,
        tied=bool(config.get("tie_word_embeddings", False)),
        residual=Residual(before_attention="ln_1", parallel=True),
        tensors=replace(found.tensors, positions=None),
        each=(Layer(rope=rope),) * found.layers,
    )
