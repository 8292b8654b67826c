"""gpt-oss: a mixture with clamped gates, biases everywhere, windows in turn, and a sink for every head's attention."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, Experts, Mlp
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.mixtral import ROUTED
from soco_export.onnx.families.parts import WINDOWS, decoder
from soco_export.onnx.families.registry import family

_ALPHA, _LIMIT = 1.702, 7.0  # what transformers 4.57 has in its code and 5 in the config
_STACKED = (
    (".mlp.experts.gate_up_proj_bias", (".mlp.experts.{}.gate_proj.bias", ".mlp.experts.{}.up_proj.bias")),
    (".mlp.experts.down_proj_bias", (".mlp.experts.{}.down_proj.bias",)),
    (".mlp.experts.gate_up_proj", (".mlp.experts.{}.gate_proj.weight", ".mlp.experts.{}.up_proj.weight")),
    (".mlp.experts.down_proj", (".mlp.experts.{}.down_proj.weight",)),
)


@family("gpt_oss", keys=f"{ROUTED} {WINDOWS} swiglu_alpha swiglu_limit experts_per_token initial_context_length")
def gpt_oss(config: Config) -> Architecture:
    """Llama's block with experts in every layer."""
    base = decoder(config)
    clamp = (float(config.get("swiglu_alpha", _ALPHA)), float(config.get("swiglu_limit", _LIMIT)))
    inner = Mlp(config["intermediate_size"], ("gate_proj", "up_proj"), "down_proj", "silu", gated=True, clamp=clamp)
    experts = Experts(config["num_local_experts"], config["num_experts_per_tok"], "mlp.experts.{}", inner, "mlp.router")
    return replace(
        base,
        attention=replace(base.attention, sinks="self_attn.sinks"),
        each=tuple(replace(layer, mixture=True) for layer in base.each),
        experts=experts,
        tensors=replace(base.tensors, stored=_STACKED, turned=True),
    )
