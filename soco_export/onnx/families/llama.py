"""Llama, and those that differ from it in a bias, a window or the normalisation of queries and keys."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, ONE_WINDOW, WINDOWS, decoder
from soco_export.onnx.families.registry import family


# Biases need no key of their own: a projection has one exactly where the checkpoint stores one.
@family("llama", keys=f"{COMMON} is_llama_config")
@family("mistral", keys=f"{COMMON} {ONE_WINDOW}")
@family("ministral", "qwen2", keys=f"{COMMON} {WINDOWS}")
@family("seed_oss", keys=f"{COMMON} attention_out_bias")
@family("internlm3", keys=f"{COMMON} qkv_bias bias")
def llama(config: Config) -> Architecture:
    """RMSNorm, rotary positions, gated MLP."""
    return decoder(config)


@family("qwen3", keys=f"{COMMON} {WINDOWS}")
def qwen3(config: Config) -> Architecture:
    """Llama with RMSNorm on each head's query and key."""
    base = decoder(config)
    norm = HeadNorm("self_attn.q_norm", "self_attn.k_norm", Norm("rms", config["rms_norm_eps"]))
    return replace(base, attention=replace(base.attention, norm=norm))
