"""The dense model in llama.cpp, for whoever has it: pip install llama-cpp-python gguf.

The weights are random, so the order of heads within q and k, which GGUF has otherwise, does not matter; sizes do.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from soco_export.evaluate.decoders.decoder import IntArray
from soco_export.files.json import read_config

KINDS = {"same": "F32", "int8": "Q8_0", "int4": "Q4_0"}
CONTEXT = 1024
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def installed() -> bool:
    """Whether this environment has llama.cpp and can write files for it."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def write_gguf(source: Path, weights: str, out: Path) -> Path:
    """Write a Llama checkpoint with a tied head as GGUF, its matrices in llama.cpp's form of `weights`."""
    import gguf

    kind, config = gguf.GGMLQuantizationType[KINDS[weights]], read_config(source)
    writer = gguf.GGUFWriter(out, "llama")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, array in load_file(source / "model.safetensors").items():
        own = kind if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        values = gguf.quants.quantize(np.ascontiguousarray(array, np.float32), own)
        writer.add_tensor(_renamed(name), values, raw_dtype=own)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def _renamed(name: str) -> str:
    if name.startswith("model.layers."):
        _, _, index, *parts, last = name.split(".")
        return f"blk.{index}.{NAMES['.'.join(parts)]}.{last}"
    return {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}[name]


class LlamaCpp:
    """A GGUF file whose passes are timed like a Decoder's: all logits, from the same place again and again."""

    def __init__(self, path: Path, threads: int) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._silent = llama_cpp.llama_log_callback(lambda *_: None)  # kept: llama.cpp holds no reference to it
        self._api.llama_log_set(self._silent, None)
        self._api.llama_backend_init()
        model = self._api.llama_model_load_from_file(str(path).encode(), self._api.llama_model_default_params())
        settings = self._api.llama_context_default_params()
        settings.n_ctx = CONTEXT
        settings.n_batch = settings.n_ubatch = CONTEXT
        settings.n_threads = settings.n_threads_batch = threads
        self._context = self._api.llama_init_from_model(model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp does not load {path}")
        self._past = 0

    def release(self) -> None:
        """Begin anew; what a pass follows stays where it is, for the cache is llama.cpp's own."""
        self._past = 0

    def prefill(self, ids: IntArray) -> None:
        """Begin a sequence with `ids` [1, n]."""
        self.release()
        self.repeatable(ids)()
        self._past = ids.shape[1]

    def repeatable(self, ids: IntArray) -> Callable[[], None]:
        """Return a function that runs `ids` [1, n] behind what was prefilled, each time from there."""
        count, past = ids.shape[1], self._past
        batch = self._api.llama_batch_init(count, 0, 1)
        batch.n_tokens = count
        for index, token in enumerate(ids[0].tolist()):
            batch.token[index], batch.pos[index] = token, past + index
            batch.n_seq_id[index], batch.seq_id[index][0], batch.logits[index] = 1, 0, 1
        memory = self._api.llama_get_memory(self._context)

        def run() -> None:
            self._api.llama_memory_seq_rm(memory, 0, past, -1)
            if self._api.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            self._api.llama_get_logits_ith(self._context, -1)  # waits until they are there

        return run
