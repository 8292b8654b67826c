"""EXAONE 4 and HunYuan: Llama with normalised queries and keys, where the norms stand elsewhere."""

from __future__ import annotations

from dataclasses import replace

from soco_export.files.rope import TABLES
from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.parts import COMMON, POST_NORM, WINDOWS, decoder, layer_kinds, layers
from soco_export.onnx.families.registry import family


@family("exaone4", keys=f"{COMMON} {WINDOWS} sliding_window_pattern")
def exaone4(config: Config) -> Architecture:
    """Norms after the sublayers; beside layers with a window, those that see everything do not turn."""
    kinds = layer_kinds(config)
    turning = [kind == "sliding_attention" or not config.get("sliding_window") for kind in kinds]
    base = decoder(config, each=layers(config, turning=turning))
    norm = HeadNorm("self_attn.q_norm", "self_attn.k_norm", Norm("rms", config["rms_norm_eps"]))
    return replace(base, residual=POST_NORM, attention=replace(base.attention, norm=norm))


@family(
    "hunyuan_v1_dense",
    keys=f"""{COMMON} eod_token_id attention_head_dim cla_share_factor norm_type use_qk_norm use_rotary_pos_emb
    num_experts norm_topk_prob""",
)
def hunyuan(config: Config) -> Architecture:
    """Queries and keys are normalised after they have turned; an `alpha` fixes the rotation of type `dynamic`."""
    for key, value in (("use_cla", False), ("use_qk_norm", True), ("norm_type", "rms"), ("num_experts", 1)):
        config.require(key, (value,))
    for key in TABLES:
        rope = config.get(key, {})
        if rope.get("alpha") and "dynamic" in (rope.get("rope_type"), rope.get("type")):
            stretched = {**rope, "rope_type": "alpha"}
            config = replace(config, values={**config.values, key: stretched})
    base, norm = decoder(config), Norm("rms", config["rms_norm_eps"])
    heads = HeadNorm("self_attn.query_layernorm", "self_attn.key_layernorm", norm, rotated=True)
    return replace(base, attention=replace(base.attention, norm=heads))
