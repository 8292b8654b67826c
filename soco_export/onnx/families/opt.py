"""OPT: LayerNorm, learned positions, plain MLP, biases everywhere."""

from __future__ import annotations

from soco_export.onnx.describe.architecture import Architecture, Names, Norm
from soco_export.onnx.describe.config import Config, activation
from soco_export.onnx.families.registry import family


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
        activation=activation(config, "activation_function"),
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
