"""Perplexity and bytes with keys and values in int8 (export.cache) beside floats, in the contrib flavour.

    python -m benchmarks.kv.int8 --out benchmarks/kv/int8.json

Both graphs read the evaluation text; each token is scored from keys and values as the cache has them. `step_bytes`:
weights and cache that a decode step reads after so many tokens, the last that the context holds among them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.kv.__main__ import step_bytes
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.parity import compare_logits
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.export import export_onnx
from soco_export.model.load import load_model
from soco_export.onnx.inspect import cache_bytes
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_train.data.corpus import load_blocks

COMPARED = 8  # blocks whose logits are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="a recipe")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.model)
    model, tokenizer = load_model(recipe)
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens.numpy()
    found: dict[str, Any] = {"command": f"python -m benchmarks.kv.int8 {' '.join(sys.argv[1:])}", "rows": {}}
    logits: list[list[np.ndarray]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_checkpoint(model.float(), tokenizer, work / "hf")
        for cache in ("same", "int8"):
            settings = ExportSettings(flavour="contrib", cache=cache, layouts=("ort",))
            export_onnx(work / "hf", work / cache, settings, calibration=lambda: calibration)
            decoder = OnnxDecoder(work / cache, threads=1)
            logits.append([decoder.logits(block[None])[0] for block in evaluation[:COMPARED]])
            found["rows"][cache] = {
                "perplexity": measure_perplexity(decoder, evaluation).value,
                "cache_bytes_a_token": cache_bytes(work / cache),
                "step_bytes": step_bytes(work / cache, model.config),
            }
        pairs = [compare_logits(*pair) for pair in zip(*logits, strict=True)]
        found |= {"kl": float(np.mean([pair.mean_kl for pair in pairs])), "compared_blocks": len(pairs)}
    print(found)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
