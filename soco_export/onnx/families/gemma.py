"""Gemma: factors of norms stored less one, scaled embeddings; from 2 on sandwich norms, caps, windows in turn."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm, Residual, Scales
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, WINDOWS, decoder, gated_mlp
from soco_export.onnx.families.registry import EACH_KIND, family

_SANDWICH = Residual(
    before_attention="input_layernorm",
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
LATER = f"""{COMMON} {WINDOWS} hidden_activation query_pre_attn_scalar final_logit_softcapping attn_logit_softcapping
    sliding_window_size"""


def _norm(config: Config) -> Norm:
    return Norm("rms", config["rms_norm_eps"], offset=1.0)


def _scales(config: Config) -> Scales:
    return Scales(embedding=config["hidden_size"] ** 0.5, cap=config.get("final_logit_softcapping"))


@family("gemma", keys=f"{COMMON} hidden_activation")
def gemma(config: Config) -> Architecture:
    """Llama's block."""
    config.require("use_bidirectional_attention", (False,))
    return replace(decoder(config, _norm(config)), scales=_scales(config))


@family("gemma2", keys=LATER)
def gemma2(config: Config) -> Architecture:
    """Sandwich norms, capped scores and logits, every other layer a window."""
    config.require("use_bidirectional_attention", (False,))
    base = decoder(config, _norm(config), gated_mlp(config, "hidden_activation"))
    attention = replace(
        base.attention, scale=config["query_pre_attn_scalar"] ** -0.5, cap=config.get("attn_logit_softcapping")
    )
    return replace(base, attention=attention, residual=_SANDWICH, scales=_scales(config))


@family("gemma3_text", keys=f"{LATER} {EACH_KIND} rope_local_base_freq sliding_window_pattern _sliding_window_pattern")
def gemma3(config: Config) -> Architecture:
    """Gemma 2 with normalised queries and keys, and a rotation of its own where there is a window."""
    base = gemma2(config)
    norm = HeadNorm("self_attn.q_norm", "self_attn.k_norm", _norm(config))
    # transformers reads attn_logit_softcapping here and does nothing with it
    return replace(base, attention=replace(base.attention, norm=norm, cap=None))
