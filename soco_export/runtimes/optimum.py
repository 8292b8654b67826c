"""What optimum and transformers look for beside model.onnx: config, generation config, tokenizer."""

from __future__ import annotations

from pathlib import Path

from soco_export.checkpoint.versions import tokenizer_in_both_forms
from soco_export.files.json import FIX, read_config
from soco_export.files.tokenizer import tokenizer_files
from soco_export.files.wrapped import language_model
from soco_export.runtimes.registry import Layout, Runtime, runtime, write_json
from soco_train.bounded import read_bytes, read_json
from soco_train.installed import install_command


@runtime("optimum")
class Optimum(Runtime):
    """ORTModelForCausalLM and AutoTokenizer: config, generation config and tokenizer beside model.onnx."""

    packages = ("optimum", "optimum-onnx")
    install = install_command("optimum")
    target = ("export.flavour=standard", "export.layouts=[optimum]")

    def write(self, to: Layout) -> None:
        """Write config, generation config and tokenizer as transformers looks for them."""
        write_hugging_face_files(to.source, to.folder)


def write_hugging_face_files(source: Path, folder: Path) -> None:
    """Copy config, generation config and tokenizer of an HF folder, without what concerns weights."""
    config = read_config(source)
    config = language_model(config) or config
    # The graph holds the factors already: nothing may look for them in safetensors.
    config.pop("quantization_config", None)
    write_json(folder / "config.json", config)
    generation = ["generation_config.json"] if (source / "generation_config.json").exists() else []
    for name in (*generation, *tokenizer_files(source)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(read_bytes(source / name, FIX))  # bounded: it may lead to a device
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.exists() and (folder / "tokenizer.json").exists():
        write_json(tokenizer, tokenizer_in_both_forms(read_json(tokenizer, FIX)))
