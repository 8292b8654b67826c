"""GPT-NeoX (Pythia): a quarter of each head turns, one projection stored head by head, two norms in parallel."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, Attention, Mlp, Norm, Residual, Tensors
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import LAYER_NORM, activation, decoder
from soco_export.onnx.families.registry import PART, family


@family("gpt_neox", keys=f"{LAYER_NORM} {PART} use_parallel_residual is_decoder rotary_pct rotary_emb_base")
def gpt_neox(config: Config) -> Architecture:
    """Biases everywhere but in the head."""
    heads, inner = config["num_attention_heads"], config["intermediate_size"]
    mlp = Mlp(inner, ("mlp.dense_h_to_4h",), "mlp.dense_4h_to_h", activation(config, "hidden_act"))
    base = decoder(config, Norm("layer", config["layer_norm_eps"], bias=True), mlp)
    size, fused = config["hidden_size"] // heads, ("attention.query_key_value",)
    return replace(
        base,
        attention=Attention(heads, heads, size, fused, "attention.dense", groups=heads),
        residual=Residual(
            before_attention="input_layernorm",
            before_mlp="post_attention_layernorm",
            parallel=bool(config.get("use_parallel_residual", False)),
        ),
        tensors=Tensors(
            embed="gpt_neox.embed_in",
            final_norm="gpt_neox.final_layer_norm",
            layer="gpt_neox.layers.{}",
            stored=(("embed_out.", ("lm_head.",)),),
        ),
    )
