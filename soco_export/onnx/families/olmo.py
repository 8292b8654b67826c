"""OLMo: a norm without parameters; from 2 on norms after the sublayers, and over all queries and keys at once."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, POST_NORM, SIZES, WINDOWS, decoder
from soco_export.onnx.families.registry import EACH_KIND, family


@family("olmo", keys=f"{SIZES} attention_bias clip_qkv")
def olmo(config: Config) -> Architecture:
    """LayerNorm without factor and bias, clipped projections."""
    base = decoder(config, Norm("layer", 1e-5, weight=False))
    return replace(base, attention=replace(base.attention, clip=config.get("clip_qkv")))


@family("olmo2", keys=COMMON)
@family("olmo3", keys=f"{COMMON} {WINDOWS} {EACH_KIND}")
def olmo2(config: Config) -> Architecture:
    """Norms after the sublayers; OLMo 3 has windows, and a rotation for each kind of layer."""
    base = decoder(config)
    norm = HeadNorm("self_attn.q_norm", "self_attn.k_norm", Norm("rms", config["rms_norm_eps"]), span="whole")
    return replace(base, residual=POST_NORM, attention=replace(base.attention, norm=norm))
