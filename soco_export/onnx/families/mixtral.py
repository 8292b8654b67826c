"""Mixtures of experts on Llama's block: Mixtral, Qwen 2 and 3, OLMoE, Granite, GLM 4, Phi."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from soco_export.onnx.describe.architecture import Architecture, Experts, HeadNorm, Mlp, Norm
from soco_export.onnx.describe.config import Config
from soco_export.onnx.families.granite import granite
from soco_export.onnx.families.parts import COMMON, ONE_WINDOW, activation, decoder, gated_mlp
from soco_export.onnx.families.registry import PART, family

# Files hold every expert apart, models in memory and some files all of a layer in one stack.
STACKED = (
    (".mlp.experts.gate_up_proj", (".mlp.experts.{}.gate_proj.weight", ".mlp.experts.{}.up_proj.weight")),
    (".mlp.experts.down_proj", (".mlp.experts.{}.down_proj.weight",)),
)
# Keys of training and of the router's loss.
_TRAINING = "output_router_logits router_aux_loss_coef router_jitter_noise"
ROUTED = f"{COMMON} {_TRAINING} num_experts num_local_experts num_experts_per_tok norm_topk_prob moe_intermediate_size"
SPARSE = f"{ROUTED} {ONE_WINDOW} decoder_sparse_step mlp_only_layers"


def _mixed(base: Architecture, experts: Experts, stored: tuple[tuple[str, tuple[str, ...]], ...]) -> Architecture:
    each = tuple(replace(layer, mixture=True) for layer in base.each)
    return replace(base, experts=experts, each=each, tensors=replace(base.tensors, stored=stored))


def _dense_in(found: Architecture, dense: Sequence[int]) -> Architecture:
    each = tuple(replace(layer, mixture=index not in dense) for index, layer in enumerate(found.each))
    return replace(found, each=each)


def _experts(config: Config, inner: str, count: str, normalised: bool = True) -> Experts:
    act = activation(config, "hidden_act")
    return Experts(
        count=config[count],
        chosen=config["num_experts_per_tok"],
        name="mlp.experts.{}",
        each=Mlp(config[inner], ("gate_proj", "up_proj"), "down_proj", act, gated=True),
        router="mlp.gate",
        normalised=normalised,
    )


def _head_norms(base: Architecture, config: Config, span: str = "head") -> Architecture:
    norm = HeadNorm("self_attn.q_norm", "self_attn.k_norm", Norm("rms", config["rms_norm_eps"]))
    norm = replace(norm, span="whole") if span == "whole" else norm
    return replace(base, attention=replace(base.attention, norm=norm))


_NUMBERED = (
    (".block_sparse_moe.", (".mlp.",)),
    (".w1.", (".gate_proj.",)),
    (".w3.", (".up_proj.",)),
    (".w2.", (".down_proj.",)),
    *STACKED,
)


@family("mixtral", keys=f"{ROUTED} {ONE_WINDOW}")
def mixtral(config: Config) -> Architecture:
    """Experts in every layer."""
    return _mixed(decoder(config), _experts(config, "intermediate_size", "num_local_experts"), _NUMBERED)


@family("phimoe", keys=f"{ROUTED} {ONE_WINDOW} input_jitter_noise lm_head_bias")
def phimoe(config: Config) -> Architecture:
    """LayerNorms, and two experts chosen one after the other; longrope as within the context it was trained for."""
    config.require("num_experts_per_tok", (2,))
    base = decoder(config, Norm("layer", config["rms_norm_eps"], bias=True))
    experts = _experts(config, "intermediate_size", "num_local_experts")
    experts = replace(experts, scoring="sparsemixer", jitter=config["router_jitter_noise"])
    return _mixed(_short(base, config), experts, ((".mlp.router.", (".mlp.gate.",)), *_NUMBERED))


def _short(base: Architecture, config: Config) -> Architecture:
    """Return the decoder within its trained context.

    transformers turns longer sequences by the same frequencies, which is not what the model was trained for.
    """
    rope = base.each[0].rope
    assert rope is not None
    if rope.switch is None:
        return base
    scaling = config.get("rope_parameters") or config["rope_scaling"]
    short = replace(rope, magnitude=float(scaling["short_mscale"]), switch=None, beyond=())
    return replace(base, context=rope.switch, each=tuple(replace(layer, rope=short) for layer in base.each))


def _dense_layers(config: Config) -> list[int]:
    step, kept = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers", [])
    return [index for index in range(config["num_hidden_layers"]) if index in kept or (index + 1) % step]


@family("qwen2_moe", keys=f"{SPARSE} layer_types shared_expert_intermediate_size qkv_bias")
def qwen2_moe(config: Config) -> Architecture:
    """A shared expert with a gate of its own; weights are not normalised unless the config says so."""
    experts = _experts(config, "moe_intermediate_size", "num_experts", bool(config.get("norm_topk_prob", False)))
    inputs = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
    size, act = config["shared_expert_intermediate_size"], experts.each.activation
    shared = Mlp(size, inputs, "mlp.shared_expert.down_proj", act, gated=True)
    experts = replace(experts, shared=shared, shared_gate="mlp.shared_expert_gate")
    return _dense_in(_mixed(decoder(config), experts, STACKED), _dense_layers(config))


@family("qwen3_moe", keys=SPARSE)
def qwen3_moe(config: Config) -> Architecture:
    """Normalised queries and keys."""
    experts = _experts(config, "moe_intermediate_size", "num_experts", bool(config.get("norm_topk_prob", False)))
    return _dense_in(_mixed(_head_norms(decoder(config), config), experts, STACKED), _dense_layers(config))


@family("olmoe", keys=f"{ROUTED} clip_qkv")
def olmoe(config: Config) -> Architecture:
    """Queries and keys normalised over all heads."""
    config.require("clip_qkv", (None,))
    experts = _experts(config, "intermediate_size", "num_experts", bool(config.get("norm_topk_prob", False)))
    return _mixed(_head_norms(decoder(config), config, "whole"), experts, STACKED)


@family(
    "granitemoe",
    keys=f"{ROUTED} embedding_multiplier logits_scaling residual_multiplier attention_multiplier",
)
def granitemoe(config: Config) -> Architecture:
    """Granite's factors."""
    stored = (
        (".block_sparse_moe.input_linear.weight", (".mlp.experts.gate_up_proj",)),
        (".block_sparse_moe.output_linear.weight", (".mlp.experts.down_proj",)),
        (".block_sparse_moe.router.layer.", (".mlp.gate.",)),
        (".block_sparse_moe.router.", (".mlp.gate.",)),
        (".block_sparse_moe.", (".mlp.",)),
        *STACKED,
    )
    return _mixed(granite(config), _experts(config, "intermediate_size", "num_local_experts"), stored)


@family(
    "glm4_moe",
    keys=f"""{ROUTED} {PART} n_shared_experts n_routed_experts routed_scaling_factor n_group topk_group
    first_k_dense_replace use_qk_norm num_nextn_predict_layers""",
)
def glm4_moe(config: Config) -> Architecture:
    """Sigmoid scores with a correction of the choice, dense first layers, a shared expert."""
    config.require("n_group", (1,))
    base = decoder(config, mlp=gated_mlp(config))
    base = _head_norms(base, config) if config.get("use_qk_norm") else base
    inner, act = config["moe_intermediate_size"], activation(config, "hidden_act")
    inputs = ("mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj")
    experts = replace(
        _experts(config, "moe_intermediate_size", "n_routed_experts", bool(config.get("norm_topk_prob", False))),
        scoring="sigmoid",
        scale=config["routed_scaling_factor"],
        correction="mlp.gate.e_score_correction_bias",
        shared=Mlp(inner * config["n_shared_experts"], inputs, "mlp.shared_experts.down_proj", act, gated=True),
    )
    return _dense_in(_mixed(base, experts, STACKED), range(config["first_k_dense_replace"]))
