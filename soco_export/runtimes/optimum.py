"""What optimum and transformers look for beside model.onnx: config, generation config, tokenizer."""

from __future__ import annotations

import shutil

from soco_export.checkpoint.versions import tokenizer_in_both_forms
from soco_export.files.json import FIX, read_config
from soco_export.runtimes.registry import Layout, layout, write_json
from soco_train.store.bounded import read_json

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


@layout("optimum")
def optimum(to: Layout) -> None:
    """Config, generation config and tokenizer, as ORTModelForCausalLM and AutoTokenizer look for them."""
    config = read_config(to.source)
    # The graph holds the factors already: nothing may look for them in safetensors.
    config.pop("quantization_config", None)
    write_json(to.folder / "config.json", config)
    for name in ("generation_config.json", *TOKENIZER_FILES):
        if (to.source / name).exists():
            shutil.copyfile(to.source / name, to.folder / name)
    tokenizer = to.folder / "tokenizer_config.json"
    if tokenizer.exists() and (to.folder / "tokenizer.json").exists():
        write_json(tokenizer, tokenizer_in_both_forms(read_json(tokenizer, FIX)))
