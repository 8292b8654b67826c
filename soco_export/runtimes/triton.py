"""A Triton model repository around model.onnx: the decoder, and text to text in front of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from soco_export.files.atomic import link
from soco_export.files.names import MODEL_FILE
from soco_export.onnx.inspect import CACHE, Port, Ports, read_ports
from soco_export.runtimes.registry import Layout, Runtime, runtime, special_tokens

TRITON_TYPES = {
    "INT64": "TYPE_INT64",
    "FLOAT": "TYPE_FP32",
    "FLOAT16": "TYPE_FP16",
    "BFLOAT16": "TYPE_BF16",
    "INT8": "TYPE_INT8",
    "UINT8": "TYPE_UINT8",
}


@runtime("triton")
class Triton(Runtime):
    """A Triton model repository in `triton/`; the model's files are linked, not copied, where the disk can.

    `decoder` is the graph in Triton's ONNX Runtime backend. `generate` is text to text in its Python backend and calls
    `decoder`; it needs a tokenizer.json, and a cache that numpy can hold (no bfloat16).
    """

    reads_cache_sizes = reads_cache_types = True
    install = "install Triton Inference Server: docs/serving.md"
    target = ("export.flavour=standard", "export.layouts=[optimum, triton]")

    def write(self, to: Layout) -> None:
        """Write the repository."""
        ports = read_ports(to.folder)
        version = to.folder / "triton" / "decoder" / "1" / MODEL_FILE
        version.mkdir(parents=True)
        # Several files make one model: Triton then wants a folder called model.onnx.
        for name in (MODEL_FILE, f"{MODEL_FILE}.data"):
            link(to.folder / name, version / name)
        sections = [_triton_ports("input", ports.inputs), _triton_ports("output", ports.outputs)]
        lines = ['name: "decoder"', 'backend: "onnxruntime"', "max_batch_size: 0", *sections]
        (version.parents[1] / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        if (to.source / "tokenizer.json").exists() and ports.inputs[f"{CACHE}.0.key"].dtype != "BFLOAT16":
            _triton_generate(to, ports)

    def here(self) -> str | None:
        """Return where its server is."""
        return shutil.which("tritonserver")


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
    end = special_tokens(to).get("eos_token_id", [])
    decoder = {
        "inputs": [name for name in ports.inputs if not _cached(name)],
        "empty": {name: [1, port.shape[1], 0, port.shape[3]] for name, port in ports.inputs.items() if _cached(name)},
        "type": TRITON_TYPES[ports.inputs[f"{CACHE}.0.key"].dtype],
        "ends": end if isinstance(end, list) else [end],
    }
    # JSON inside a string of the text format, which escapes as JSON does.
    text = TRITON_GENERATE.format(decoder=json.dumps(json.dumps(decoder)))
    (version.parent / "config.pbtxt").write_text(text, encoding="utf-8")


def _cached(name: str) -> bool:
    return name.startswith(CACHE)


def _triton_ports(kind: str, ports: Mapping[str, Port]) -> str:
    entries = [
        f'  {{ name: "{name}" data_type: {TRITON_TYPES[port.dtype]} '
        f"dims: [ {', '.join(str(size) if isinstance(size, int) else '-1' for size in port.shape)} ] }}"
        for name, port in ports.items()
    ]
    return f"{kind} [\n" + ",\n".join(entries) + "\n]"
