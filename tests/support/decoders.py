"""Tiny random checkpoints of every described family, dense or factored, and the loop that tests compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from soco_train.modules.sites import as_linear

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS = {
    "llama": ("llama", {**BASE, "tie_word_embeddings": False}),
    "llama-biased": ("llama", {**BASE, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama3-rope": ("llama", {**BASE, "rope_theta": 5000.0, "rope_scaling": LLAMA3}),
    "smollm2": ("llama", {**BASE, "hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1,
                          "rope_theta": 1e5, "tie_word_embeddings": True}),
    "mistral": ("mistral", {**BASE, "sliding_window": 6, "head_dim": 16}),
    "qwen2": ("qwen2", {**BASE, "rope_theta": 1e6}),
    "qwen2-windows": ("qwen2", {**BASE, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**BASE, "head_dim": 32, "tie_word_embeddings": True}),
    "opt": ("opt", {"vocab_size": 96, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "dropout": 0.0,
                    "num_attention_heads": 4, "max_position_embeddings": 256, "word_embed_proj_dim": 64}),
}  # fmt: skip


def tiny_model(name: str, seed: int = 0, configs: Any = CONFIGS, **changes: Any) -> torch.nn.Module:
    """A random model whose every parameter matters: norms, biases and positions are not left at one and zero."""
    torch.manual_seed(seed)
    model_type, values = configs[name]
    values = {**values, **changes, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(model_type, attn_implementation="eager", **values)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.copy_(torch.randn_like(parameter) * parameter.shape[-1] ** -0.5 * 1.5)
    return model


def save_dense(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def factor(model: torch.nn.Module, folder: Path, kinds: dict[str, tuple[str, int]]) -> Path:
    """Write `model` with the Linears of `kinds` (suffix → kind, rank) factored, and put the same maps into `model`."""
    save_dense(model, folder)
    tensors, layers = load_file(folder / "model.safetensors"), {}
    for name, module in model.named_modules():
        kind, rank = next((value for suffix, value in kinds.items() if name.endswith(suffix)), (None, 0))
        if kind is None:
            continue
        linear = as_linear(module)
        m, n = linear.weight.shape
        left, right = torch.randn(m, rank) / rank**0.5, torch.randn(rank, n) / n**0.5
        if kind == "stacked":
            stored, dense = {"weight": right, "up.weight": left}, left @ right
        else:
            order, mix = torch.randperm(m), left[rank:] / 2
            rows = torch.cat([right, mix @ right])
            dense = torch.empty_like(rows).index_copy(0, order, rows)
            stored = {"weight": right, "mix.weight": mix, "order": order}
        tensors.pop(f"{name}.weight")
        bias = tensors.pop(f"{name}.bias", None)
        if bias is not None:
            stored["up.bias" if kind == "stacked" else "bias"] = bias
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
        layers[name] = {"kind": kind, "rank": rank, "bias": bias is not None}
        linear.weight.data.copy_(dense)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "soco-export", "storage": "stacked", "layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Decoder:
    """A plain ONNX Runtime session with its cache, fed as a user would feed it."""

    def __init__(self, folder: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        path = str(folder / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.reset()

    def reset(self) -> None:
        self.cache: dict[str, np.ndarray] = {}

    def step(self, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Logits of `tokens` [b, s]; `mask` [b, past + s] covers the cache too."""
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, -tokens.shape[1] :]
        feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": positions}
        for name, value in self.inputs.items():
            if name.startswith("past_key_values"):
                kind = {
                    "tensor(float)": np.float32,
                    "tensor(float16)": np.float16,
                    "tensor(int8)": np.int8,
                    "tensor(uint8)": np.uint8,
                }[value.type]
                empty = np.zeros((len(tokens), value.shape[1], 0, value.shape[3]), kind)
                feed[name] = self.cache.get(name, empty)
        results = self.session.run(None, {name: feed[name] for name in self.inputs})
        named = dict(zip(self.outputs, results, strict=True))
        self.cache = {name.replace("present", "past_key_values"): named[name] for name in named if name != "logits"}
        return named["logits"]


def torch_logits(model: torch.nn.Module, tokens: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Logits of the whole sequences in eager PyTorch, without a cache."""
    mask = torch.from_numpy(mask)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(torch.from_numpy(tokens), attention_mask=mask, position_ids=positions).logits.numpy()
