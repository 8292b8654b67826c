"""OPT: LayerNorm, learned positions, plain MLP, biases everywhere."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import Architecture, Attention, Layer, Mlp, Norm, Residual, Tensors
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import activation
from soco_export.onnx.families.registry import family


@family(
    "opt",
    keys="""hidden_size ffn_dim num_hidden_layers num_attention_heads max_position_embeddings word_embed_proj_dim
    do_layer_norm_before _remove_final_layer_norm activation_function enable_bias layer_norm_elementwise_affine""",
)
def opt(config: Config) -> Architecture:
    """Pre-norm OPT; the 350M model's norm after the addition and its narrow embedding are refused."""
    config.require("do_layer_norm_before", (True,))
    config.require("_remove_final_layer_norm", (False,))
    config.require("layer_norm_elementwise_affine", (True,))
    config.require("word_embed_proj_dim", (config["hidden_size"],))
    heads = config["num_attention_heads"]
    inputs = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    return Architecture(
        family="opt",
        hidden=config["hidden_size"],
        vocab=config["vocab_size"],
        context=config["max_position_embeddings"],
        tied=bool(config.get("tie_word_embeddings", True)),
        norm=Norm("layer", 1e-5, bias=True),
        attention=Attention(heads, heads, config["hidden_size"] // heads, inputs, "self_attn.out_proj"),
        mlp=Mlp(config["ffn_dim"], ("fc1",), "fc2", activation(config, "activation_function")),
        residual=Residual(before_attention="self_attn_layer_norm", before_mlp="final_layer_norm"),
        tensors=Tensors(
            embed="model.decoder.embed_tokens",
            final_norm="model.decoder.final_layer_norm",
            layer="model.decoder.layers.{}",
            positions="model.decoder.embed_positions",
            position_offset=2,
        ),
        each=(Layer(),) * config["num_hidden_layers"],
    )
