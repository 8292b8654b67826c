"""Rotary decoders with LayerNorm or a plain MLP: StarCoder2, StableLM, Nemotron, Arcee."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Mlp, Norm, Residual
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, LAYER_NORM, ONE_WINDOW, SIZES, activation, decoder
from soco_export.onnx.families.registry import PART, family


def _plain(config: Config, into: str, out: str) -> Mlp:
    return Mlp(config["intermediate_size"], (f"mlp.{into}",), f"mlp.{out}", activation(config, "hidden_act"))


@family("starcoder2", keys=f"{SIZES} {ONE_WINDOW} norm_epsilon use_bias mlp_type norm_type")
def starcoder2(config: Config) -> Architecture:
    """LayerNorm, plain MLP, windows, biases."""
    return decoder(config, Norm("layer", config["norm_epsilon"], bias=True), _plain(config, "c_fc", "c_proj"))


@family(
    "stablelm",
    keys=f"{LAYER_NORM} {PART} use_qkv_bias qk_layernorm use_parallel_residual rope_pct norm_eps rotary_scaling_factor",
)
def stablelm(config: Config) -> Architecture:
    """LayerNorm, gated MLP, a quarter of each head turns; queries and keys may have a norm for each head."""
    config.require("rotary_scaling_factor", (1.0,))
    norm = Norm("layer", config["layer_norm_eps"], bias=True)
    base = decoder(config, norm)
    bare = Norm("layer", config["layer_norm_eps"])
    heads = HeadNorm("self_attn.q_layernorm.norms.{}", "self_attn.k_layernorm.norms.{}", bare, span="each")
    found = replace(base, attention=replace(base.attention, norm=heads if config.get("qk_layernorm") else None))
    if not config.get("use_parallel_residual"):
        return found
    return replace(found, residual=Residual(before_attention="input_layernorm", parallel=True))


@family("nemotron", keys=f"{SIZES} {PART} norm_eps attention_bias mlp_bias rope_percent")
def nemotron(config: Config) -> Architecture:
    """LayerNorm stored less one, squared ReLU, half of each head turns."""
    norm = Norm("layer", config["norm_eps"], offset=1.0, bias=True)
    return decoder(config, norm, _plain(config, "up_proj", "down_proj"))


@family("arcee", keys=COMMON)
def arcee(config: Config) -> Architecture:
    """Llama with a plain MLP of squared ReLU."""
    return decoder(config, mlp=_plain(config, "up_proj", "down_proj"))
