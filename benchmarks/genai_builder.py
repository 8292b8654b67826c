"""Our graphs beside those of onnxruntime-genai's model builder: the same tiny random weights, the same logits.

    python -m benchmarks.genai_builder --out benchmarks/results/genai-builder.json

A prompt of 16 tokens and eight cached steps go through both graphs; what counts is the largest difference as a share of
the largest logit. Which of the two is right where they differ is asked of transformers, on the whole sequence. Families
that the builder does not have, or refuses at these sizes, are there with its own words. Needs onnxruntime-genai.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from soco_export import save_checkpoint
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from tests.support.decoders import CONFIGS, Decoder, tiny_model
from tests.support.models import VOCABULARY, make_tokenizer
from tests.support.zoo import ZOO

PROMPT, STEPS = 16, 8
FAMILIES = (
    *("llama", "llama3-rope", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3"),
    *("phi4-mini", "phimoe", "granite", "olmo", "nemotron", "ernie4_5", "smollm3", "internlm3", "gpt_oss"),
)
# sizes and quirks of our tiny configs that the builder does not serve: it rotates inside of heads, keeps a cache of a
# window's length, and knows of phi3 the published contexts alone
_CHANGED: Mapping[str, Mapping[str, Any]] = {
    "mistral": {"sliding_window": 64},
    "gemma": {"head_dim": 32},
    "gemma2": {"head_dim": 32, "sliding_window": 64},
    "phi": {"hidden_size": 128, "qk_layernorm": False},
    "phi3": {"max_position_embeddings": 4096, "sliding_window": None},
    "nemotron": {"head_dim": 32},
    "olmo": {"clip_qkv": None},
}


def build(folder: Path, out: Path) -> None:
    """Let the builder write its graph of a Hugging Face folder in fp32 for the CPU."""
    from onnxruntime_genai.models import builder

    where = ("", str(folder), str(out), "fp32", "cpu", str(out / "cache"))
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        builder.create_model(*where, **builder.parse_extra_options(*where, None))


class Built(Decoder):
    """The builder's graph, whose caches leave their sizes to genai_config.json."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        decoder = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["decoder"]
        shape = [1, decoder["num_key_value_heads"], 0, decoder["head_size"]]
        for name, value in self.inputs.items():
            if name.startswith("past_key_values"):
                self.inputs[name] = SimpleNamespace(name=name, type=value.type, shape=shape)


def through(decoder: Decoder, tokens: np.ndarray) -> np.ndarray:
    """Return the logits of a prompt and its cached steps."""
    pieces = [(0, PROMPT), *((at, at + 1) for at in range(PROMPT, PROMPT + STEPS))]
    mask = np.ones_like(tokens)
    return np.concatenate([decoder.step(tokens[:, a:b], mask[:, :b]) for a, b in pieces], axis=1)


def compare(name: str, folder: Path) -> dict[str, Any]:
    """Return the largest differences, builder to us and each to transformers; or why the builder made nothing."""
    model = tiny_model(name, configs={**CONFIGS, **ZOO}, vocab_size=VOCABULARY, **_CHANGED.get(name, {}))
    save_checkpoint(model, make_tokenizer(), folder / "hf")  # its config.json says rope in every form
    export_onnx(folder / "hf", folder / "ours", ExportSettings(flavour="contrib"))
    tokens = np.random.default_rng(0).integers(3, 90, (1, PROMPT + STEPS))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    ours = through(Decoder(folder / "ours"), tokens)
    found = {"ours_to_transformers": _far(ours, expected)}
    try:
        build(folder / "hf", folder / "theirs")
        theirs = through(Built(folder / "theirs"), tokens)
    except Exception as error:  # a program of others on models that it may never have seen
        first = next(iter(str(error).replace(str(folder), "FOLDER").splitlines()), "")
        return {**found, "builder": f"{type(error).__name__}: {first[:400]}"}
    return {**found, "builder_to_ours": _far(theirs, ours), "builder_to_transformers": _far(theirs, expected)}


def _far(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def main() -> None:
    """Compare every family and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("families", nargs="*", default=FAMILIES)
    args = parser.parse_args()
    results: dict[str, Mapping[str, Any]] = {}
    for name in args.families:
        with tempfile.TemporaryDirectory() as folder:
            results[name] = compare(name, Path(folder))
        print(name, json.dumps(results[name]))
    versions = {name: version(name) for name in ("onnxruntime-genai", "onnxruntime", "transformers", "torch")}
    command = "python -m benchmarks.genai_builder --out benchmarks/results/genai-builder.json"
    text = json.dumps({"command": command, "versions": versions, "families": results}, indent=1)
    args.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
