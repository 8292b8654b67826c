"""What each runtime wants beside model.onnx: one decorated writer per layout, called in the order of export.layouts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_export.checkpoint.forms import tokenizer_in_both_forms
from soco_export.onnx.architecture import Architecture, Config
from soco_export.onnx.inspect import MODEL_FILE
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import RecipeError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


@dataclass(frozen=True)
class Layout:
    """What a writer gets: the HF folder, the folder with model.onnx, and what is known of the model."""

    source: Path
    folder: Path
    config: Config
    architecture: Architecture
    settings: ExportSettings


Writer = Callable[[Layout], None]
LAYOUTS: dict[str, Writer] = {}


def layout(name: str) -> Callable[[Writer], Writer]:
    """Register a writer under a word for export.layouts."""

    def register(writer: Writer) -> Writer:
        LAYOUTS[name] = writer
        return writer

    return register


def check_layouts(settings: ExportSettings) -> None:
    """Raise RecipeError for a layout that nobody writes."""
    for name in settings.layouts:
        if name not in LAYOUTS:
            raise RecipeError(
                f"there is no layout {name!r}", fix=f"use one of {', '.join(LAYOUTS)}", where="export.layouts"
            )


def write_layouts(to: Layout) -> None:
    """Run the writers that the settings name."""
    for name in to.settings.layouts:
        LAYOUTS[name](to)


@layout("optimum")
def optimum(to: Layout) -> None:
    """Config, generation config and tokenizer, as ORTModelForCausalLM and AutoTokenizer look for them."""
    config = _read(to.source / "config.json")
    # The graph holds the factors already: nothing may look for them in safetensors.
    config.pop("quantization_config", None)
    _write(to.folder / "config.json", config)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (to.source / name).exists():
            shutil.copyfile(to.source / name, to.folder / name)
    tokenizer = to.folder / "tokenizer_config.json"
    if tokenizer.exists() and (to.folder / "tokenizer.json").exists():
        _write(tokenizer, tokenizer_in_both_forms(_read(tokenizer)))


# onnxruntime-genai decides by this name how it loads; families it does not know load like llama.
GENAI_TYPES = {"llama", "mistral", "qwen2", "qwen3"}


@layout("genai")
def genai(to: Layout) -> None:
    """genai_config.json; the cache is one shared buffer in the contrib flavour only."""
    shape, tokens = to.architecture, _special_tokens(to)
    contrib = to.settings.flavour == "contrib"
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if not contrib or shape.names.positions:
        inputs["position_ids"] = "position_ids"
    decoder = {
        "filename": MODEL_FILE,
        "head_size": shape.head_dim,
        "hidden_size": shape.hidden,
        "inputs": inputs | {"past_key_names": "past_key_values.%d.key", "past_value_names": "past_key_values.%d.value"},
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
    }
    model = {
        **tokens,
        "context_length": shape.context,
        "decoder": decoder,
        "type": shape.family if shape.family in GENAI_TYPES else "llama",
        "vocab_size": shape.vocab,
    }
    search = {"do_sample": False, "max_length": shape.context, "past_present_share_buffer": contrib}
    _write(to.folder / "genai_config.json", {"model": model, "search": search})


def _special_tokens(to: Layout) -> dict[str, Any]:
    """The generation config's ids win over the config's; the first end token pads where nothing else does."""
    path = to.source / "generation_config.json"
    generation = _read(path) if path.exists() else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: generation.get(key, to.config.get(key)) for key in keys}
    end = ids["eos_token_id"][0] if isinstance(ids["eos_token_id"], list) else ids["eos_token_id"]
    fallback = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {key: fallback[key] if ids[key] is None else ids[key] for key in keys if (ids[key], end) != (None, None)}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
