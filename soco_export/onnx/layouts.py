"""What each runtime wants beside model.onnx: one decorated writer per layout, called in the order of export.layouts."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_export.checkpoint.forms import tokenizer_in_both_forms
from soco_export.onnx.architecture import Config
from soco_export.onnx.inspect import CACHE, MODEL_FILE, Port, Ports, read_ports
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
    """What a writer gets: the HF folder and its config, the folder with model.onnx, and how that was made."""

    source: Path
    folder: Path
    config: Config
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


@layout("genai")
def genai(to: Layout) -> None:
    """genai_config.json for onnxruntime-genai; the cache is one shared buffer in the contrib flavour only."""
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
    family, context = to.config["model_type"], to.config["max_position_embeddings"]
    model = {
        **_special_tokens(to),
        "context_length": context,
        "decoder": decoder,
        "type": family if family in GENAI_TYPES else "llama",
        "vocab_size": to.config["vocab_size"],
    }
    share = to.settings.flavour == "contrib"
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": share}
    _write(to.folder / "genai_config.json", {"model": model, "search": search})


TRITON_TYPES = {"INT64": "TYPE_INT64", "FLOAT": "TYPE_FP32", "FLOAT16": "TYPE_FP16", "BFLOAT16": "TYPE_BF16"}


@layout("triton")
def triton(to: Layout) -> None:
    """A Triton model repository in `triton/`; the model's files are linked, not copied, where the disk can.

    `decoder` is the graph in Triton's ONNX Runtime backend. `generate` is text to text in its Python backend and calls
    `decoder`; it needs a tokenizer.json, and a cache that numpy can hold (no bfloat16).
    """
    ports = read_ports(to.folder)
    version = to.folder / "triton" / "decoder" / "1" / MODEL_FILE
    version.mkdir(parents=True)
    # Several files make one model: Triton then wants a folder called model.onnx.
    for name in (MODEL_FILE, f"{MODEL_FILE}.data"):
        _link(to.folder / name, version / name)
    sections = [_triton_ports("input", ports.inputs), _triton_ports("output", ports.outputs)]
    lines = ['name: "decoder"', 'backend: "onnxruntime"', "max_batch_size: 0", *sections]
    (version.parents[1] / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if (to.source / "tokenizer.json").exists() and ports.inputs[f"{CACHE}.0.key"].dtype != "BFLOAT16":
        _triton_generate(to, ports)


TRITON_GENERATE = """name: "generate"
backend: "python"
max_batch_size: 0
input [
  {{ name: "text_input" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "max_tokens" data_type: TYPE_INT32 dims: [ 1 ] }}
]
output [
  {{ name: "text_output" data_type: TYPE_STRING dims: [ 1 ] }},
  {{ name: "prompt_token_ids" data_type: TYPE_INT64 dims: [ -1 ] }},
  {{ name: "token_ids" data_type: TYPE_INT64 dims: [ -1 ] }}
]
parameters {{ key: "decoder" value: {{ string_value: {decoder} }} }}
"""


def _triton_generate(to: Layout, ports: Ports) -> None:
    """Write `generate`, which learns from a parameter what it must feed to `decoder`."""
    version = to.folder / "triton" / "generate" / "1"
    version.mkdir(parents=True)
    shutil.copyfile(Path(__file__).with_name("triton_generate.py"), version / "model.py")
    shutil.copyfile(to.source / "tokenizer.json", version / "tokenizer.json")
    end = _special_tokens(to).get("eos_token_id", [])
    decoder = {
        "inputs": [name for name in ports.inputs if not name.startswith(CACHE)],
        "layers": ports.layers,
        "empty": [1, ports.kv_heads, 0, ports.head_dim],
        "type": TRITON_TYPES[ports.inputs[f"{CACHE}.0.key"].dtype],
        "ends": end if isinstance(end, list) else [end],
    }
    # JSON inside a string of the text format, which escapes as JSON does.
    text = TRITON_GENERATE.format(decoder=json.dumps(json.dumps(decoder)))
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")


def _triton_ports(kind: str, ports: Mapping[str, Port]) -> str:
    entries = [
        f'  {{ name: "{name}" data_type: {TRITON_TYPES[port.dtype]} '
        f"dims: [ {', '.join(str(size) if isinstance(size, int) else '-1' for size in port.shape)} ] }}"
        for name, port in ports.items()
    ]
    return f"{kind} [\n" + ",\n".join(entries) + "\n]"


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


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
