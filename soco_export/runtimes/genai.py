"""What onnxruntime-genai looks for beside model.onnx: genai_config.json."""

from __future__ import annotations

from typing import Any

from soco_export.files.names import MODEL_FILE
from soco_export.onnx.inspect import CACHE, read_ports
from soco_export.runtimes.registry import Layout, Runtime, runtime, special_tokens, write_json
from soco_train.installed import install_command

# onnxruntime-genai decides by this name how it loads; decoders that it does not know load like llama.
GENAI_TYPES = {
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "nemotron",
    "olmo",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
}


@runtime("genai")
class Genai(Runtime):
    """onnxruntime-genai, which keeps the cache in one buffer: the contrib flavour."""

    reads_cache_types = True
    packages = ("onnxruntime-genai",)
    install = install_command("genai")
    # products of one input made at once: the same numbers, and what the library's own builder does
    target = ("export.flavour=contrib", "export.layouts=[optimum, genai]", "export.pack=true")

    def write(self, to: Layout) -> None:
        """Write genai_config.json."""
        write_json(to.folder / "genai_config.json", genai_config(to))


def genai_config(to: Layout) -> dict[str, Any]:
    """Return the content of genai_config.json; the cache is one shared buffer in the contrib flavour only."""
    ports = read_ports(to.folder)
    cuda = to.settings.dtype != "float32"
    decoder = {
        "filename": MODEL_FILE,
        "head_size": ports.head_dim,
        "hidden_size": to.config["hidden_size"],
        "inputs": {name: name for name in ports.inputs if not name.startswith(CACHE)}
        | {"past_key_names": f"{CACHE}.%d.key", "past_value_names": f"{CACHE}.%d.value"},
        "num_attention_heads": to.config["num_attention_heads"],
        "num_hidden_layers": ports.layers,
        "num_key_value_heads": ports.kv_heads,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": [{"cuda": {}}] if cuda else []},
    }
    family, context = to.config["model_type"], to.config.context
    model = {
        **special_tokens(to),
        "context_length": context,
        "decoder": decoder,
        "type": family if family in GENAI_TYPES else "llama",
        "vocab_size": to.config["vocab_size"],
    }
    share = to.settings.flavour == "contrib"
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": share}
    return {"model": model, "search": search}
