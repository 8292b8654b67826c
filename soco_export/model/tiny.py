"""`--tiny`: the same architecture, shrunk until a whole run takes less than a minute.

Quirks stay (grouped heads, biases, q/k norms, sliding window, ties, rope scaling); sizes go. The weights are random,
with a decaying spectrum and logits far from flat, so that pruning costs something and parity proves something.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from soco_export.files.json import making_a_model

LAYERS = 2
HEAD_SIZE = 16
POSITIONS = 1024
# shorter than a block, so that every test runs past the window
WINDOW = 48
TINY_BLOCK = 64
VOCABULARY = 2048
EXPERTS = 8
LOGIT_SCALE = 2.5


def shrink_architecture(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return config fields of a small model with the same quirks. Pure, but for the names transformers knows."""
    kind = fields["model_type"]
    names = CONFIG_MAPPING[kind].attribute_map
    with making_a_model("model.architecture"):
        config = AutoConfig.for_model(kind, **{key: value for key, value in fields.items() if key != "model_type"})
    heads = config.num_attention_heads
    groups = heads // (getattr(config, "num_key_value_heads", None) or heads)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    small_heads = 4 if groups == 1 else 2 * groups
    width = _multiple(small_heads * HEAD_SIZE * config.hidden_size / (heads * head_size))
    small: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": small_heads,
        "num_key_value_heads": small_heads // groups,
        "head_dim": HEAD_SIZE,
        "max_position_embeddings": POSITIONS,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    for key in ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "word_embed_proj_dim"):
        if fields.get(key):
            small[key] = _multiple(width * fields[key] / config.hidden_size)
    shrunk = dict(fields)
    for key, value in small.items():
        own = names.get(key, key)
        if own in fields:
            shrunk[own] = value
    ratio = POSITIONS / (getattr(config, "max_position_embeddings", None) or POSITIONS)
    return {**shrunk, **_shrunk_quirks(fields, ratio, head_size)}


def _shrunk_quirks(fields: Mapping[str, Any], ratio: float, head_size: int) -> dict[str, Any]:
    small: dict[str, Any] = {}
    if fields.get("sliding_window"):
        small["sliding_window"] = WINDOW
    # a pattern that comes once in so many layers still comes once in two
    for key in ("max_window_layers", "sliding_window_pattern", "no_rope_layer_interval"):
        if fields.get(key):
            small[key] = min(LAYERS, fields[key])
    # as many experts as show that they are chosen among, and not all of them
    if fields.get("num_experts", 0) > EXPERTS:
        small["num_experts"] = EXPERTS
        small["num_experts_per_tok"] = min(EXPERTS // 2, fields["num_experts_per_tok"])
    if fields.get("layer_types"):
        # the first and the last layer, so that a mixed pattern stays mixed
        small["layer_types"] = [fields["layer_types"][0], fields["layer_types"][-1]]
    if fields.get("rope_scaling"):
        small["rope_scaling"] = {
            key: _shrunk_rope(key, value, ratio, head_size) for key, value in fields["rope_scaling"].items()
        }
    return small


def _shrunk_rope(key: str, value: Any, ratio: float, head_size: int) -> Any:
    if key == "original_max_position_embeddings":
        return max(1, round(value * ratio))
    # longrope lists one factor for each rotated pair, which may be those of a part of the head
    return value[: len(value) * HEAD_SIZE // head_size] if isinstance(value, list) else value


def _multiple(size: float, of: int = 16) -> int:
    return max(of, round(size / of) * of)


def random_model(config: Any, seed: int) -> Any:
    """Return a causal LM of `config` with seeded random weights, fp32, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).float().eval()
        tied = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        with torch.no_grad():
            for module in model.modules():
                for name, parameter in module.named_parameters(recurse=False):
                    if id(parameter) not in tied or isinstance(module, nn.Embedding):
                        parameter.copy_(_random_values(module, name, parameter))
            head = model.get_output_embeddings()
            # Granite divides its logits by a constant, which would leave them flat
            divisor = getattr(config, "logits_scaling", None) or 1.0
            head.weight.mul_(divisor * (1.0 if id(head.weight) in tied else LOGIT_SCALE))
    return model


def _random_values(module: nn.Module, name: str, parameter: torch.Tensor) -> torch.Tensor:
    """Random values for one parameter: a decaying spectrum for Linears, rows of length LOGIT_SCALE for embeddings."""
    noise = torch.randn(parameter.shape)
    if isinstance(module, nn.Embedding):
        return noise * LOGIT_SCALE / parameter.shape[-1] ** 0.5
    if name == "bias":
        return noise * 0.1
    if parameter.ndim != 2:
        return parameter * (1 + 0.1 * noise)
    left, sigma, right = torch.linalg.svd(noise, full_matrices=False)
    sigma = torch.arange(1, len(sigma) + 1) ** -0.7
    # white input of unit size gives output of unit size
    sigma *= (parameter.shape[0] / sigma.square().sum()).sqrt()
    return (left * sigma) @ right
