"""Cohere: attention and MLP in parallel behind one LayerNorm without bias, neighbouring pairs turn, scaled logits."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm, Residual, Scales
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import LAYER_NORM, WINDOWS, decoder, layer_kinds, layers
from soco_export.onnx.families.registry import family


@family("cohere", keys=f"{LAYER_NORM} logit_scale use_qk_norm")
def cohere(config: Config) -> Architecture:
    """Queries and keys may be normalised with a factor for each head."""
    norm = Norm("layer", config["layer_norm_eps"])
    base = decoder(config, norm, each=layers(config, interleaved=True))
    each = HeadNorm("self_attn.q_norm", "self_attn.k_norm", norm, span="each")
    return replace(
        base,
        tied=bool(config.get("tie_word_embeddings", True)),
        attention=replace(base.attention, norm=each if config.get("use_qk_norm") else None),
        residual=Residual(before_attention="input_layernorm", parallel=True),
        scales=Scales(logits=config["logit_scale"]),
    )


@family("cohere2", keys=f"{LAYER_NORM} {WINDOWS} logit_scale sliding_window_pattern _sliding_window_pattern rotary_pct")
def cohere2(config: Config) -> Architecture:
    """Windows turn, layers that see everything do not."""
    config.require("rotary_pct", (1.0,))
    turning = [kind == "sliding_attention" for kind in layer_kinds(config)]
    return replace(cohere(config), each=layers(config, interleaved=True, turning=turning))
