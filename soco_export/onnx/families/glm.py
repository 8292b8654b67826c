"""GLM: neighbouring pairs in half of each head turn, fused gate and up; GLM-4: sandwich norms. Helium, ERNIE 4.5."""

from __future__ import annotations

from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, Mlp, Residual
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, activation, decoder, layers
from soco_export.onnx.families.registry import PART, family

_SANDWICH = Residual(
    before_attention="input_layernorm",
    after_attention="post_self_attn_layernorm",
    before_mlp="post_attention_layernorm",
    after_mlp="post_mlp_layernorm",
)


@family("glm", keys=f"{COMMON} {PART}")
def glm(config: Config) -> Architecture:
    """Llama's norms."""
    inner, act = config["intermediate_size"], activation(config, "hidden_act")
    mlp = Mlp(inner, ("mlp.gate_up_proj",), "mlp.down_proj", act, gated=True)
    return decoder(config, mlp=mlp, each=layers(config, interleaved=True))


@family("glm4", keys=f"{COMMON} {PART}")
def glm4(config: Config) -> Architecture:
    """GLM with norms before and after each sublayer."""
    return replace(glm(config), residual=_SANDWICH)


@family("helium", keys=COMMON)
@family("ernie4_5", keys=f"{COMMON} use_bias")
def interleaved(config: Config) -> Architecture:
    """Llama with neighbouring pairs."""
    return decoder(config, each=layers(config, interleaved=True))
