"""Phi: parallel attention and MLP behind one LayerNorm. Phi-3 and 4: Llama with fused projections and longrope."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Mlp, Norm, Residual
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, LAYER_NORM, ONE_WINDOW, activation, decoder
from soco_export.onnx.families.registry import PART, family


@family("phi", keys=f"{LAYER_NORM} {PART} qk_layernorm")
def phi(config: Config) -> Architecture:
    """Half of each head turns; biases everywhere, also in the head."""
    norm = Norm("layer", config["layer_norm_eps"], bias=True)
    mlp = Mlp(config["intermediate_size"], ("mlp.fc1",), "mlp.fc2", activation(config, "hidden_act"))
    base = decoder(config, norm, mlp)
    heads = HeadNorm("self_attn.q_layernorm", "self_attn.k_layernorm", norm) if config.get("qk_layernorm") else None
    return replace(
        base,
        attention=replace(base.attention, output="self_attn.dense", norm=heads),
        residual=Residual(before_attention="input_layernorm", parallel=True),
        tensors=replace(base.tensors, final_norm="model.final_layernorm"),
    )


@family("phi3", keys=f"{COMMON} {ONE_WINDOW} {PART} full_attn_mod interpolate_factor")
def phi3(config: Config) -> Architecture:
    """One projection for queries, keys and values, one for gate and up."""
    config.require("full_attn_mod", (1,))
    config.require("interpolate_factor", (1,))
    mlp = Mlp(
        config["intermediate_size"],
        ("mlp.gate_up_proj",),
        "mlp.down_proj",
        activation(config, "hidden_act"),
        gated=True,
    )
    base = decoder(config, mlp=mlp)
    return replace(base, attention=replace(base.attention, inputs=("self_attn.qkv_proj",)))
