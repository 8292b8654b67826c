"""Two-layer random models of several architectures, pruned at random, and a byte-level tokenizer for them."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from soco_export import apply_factors
from soco_train.forms.pivoted import PivotedFactors
from soco_train.forms.registry import LayerFactors
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.settings.data import LayerSettings
from soco_train.store.factors import Factors

VOCABULARY = 259
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
_SHARED = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_GQA = {**_SHARED, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}


def small_llama(**changes: Any) -> LlamaForCausalLM:
    """Return a random Llama of two layers and 64 tokens, width 32 unless `changes` of its config say otherwise."""
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()


def _rope(theta: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """Rotary settings under both versions' names; each takes its own."""
    parameters = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    return (
        {"rope_parameters": parameters}
        if hasattr(LlamaConfig(), "rope_parameters")
        else {
            "rope_theta": theta,
            "rope_scaling": scaling,
        }
    )


ARCHITECTURES = {
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**_GQA, **_rope(5000.0), tie_word_embeddings=True)),
    "llama-scaled": lambda: LlamaForCausalLM(LlamaConfig(**_GQA, **_rope(900.0, LLAMA3_ROPE))),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_GQA, **_rope(77.0), sliding_window=6)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**_GQA, **_rope(1e6), tie_word_embeddings=False)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_GQA, **_rope(1e6), tie_word_embeddings=True)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**_SHARED, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)),
}


def make_model(architecture: str, scale: float = 0.2) -> Any:
    """A model whose weights are large enough that a lost or wrong one shows in the logits."""
    model = ARCHITECTURES[architecture]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=scale) if parameter.dim() > 1 else parameter.uniform_(0.5, 1.5)
    return model


def random_layer(kind: str, linear: nn.Linear, rank: int, new_bias: bool) -> LayerFactors:
    m, n = linear.weight.shape
    bias = None if linear.bias is None else linear.bias.detach().clone()
    if new_bias:
        bias = torch.randn(m) / 4
    if kind == "stacked":
        return StackedFactors(torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5, bias)
    mix = torch.randn(m - rank, rank) / rank**0.5
    return PivotedFactors(torch.randn(rank, n) / n**0.5, mix, torch.randperm(m), bias)


def prune(model: Any, kind: str, new_bias: bool = True) -> Any:
    """Replace most projections; the last layer's MLP stays dense. kind: stacked, pivoted or mixed."""
    kinds = ("stacked", "pivoted") if kind == "mixed" else (kind,)
    linears = {name: linear for name, linear in select_linears(model, LayerSettings()).items() if "1.mlp" not in name}
    layers = {}
    for index, (name, linear) in enumerate(linears.items()):
        rank = int(torch.randint(1, min(linear.weight.shape) - 1, ()))
        layers[name] = random_layer(kinds[index % len(kinds)], linear, rank, new_bias)
    apply_factors(model, Factors(layers))
    return model


def make_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>"],
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
        padding_side="left",
    )


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()
