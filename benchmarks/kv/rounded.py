"""Perplexity and bytes with keys and values in int8 and int4 (export.cache) beside floats, in the contrib flavour.

    python -m benchmarks.kv.rounded --out benchmarks/kv/rounded.json

All graphs read the evaluation text; each token is scored from keys and values as the cache has them. `kl`: nats from
the graph with floats, the mean over some blocks. `step_bytes`: weights and cache that a decode step reads after so many
tokens, the last that the context holds among them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any, get_args

import numpy as np

from benchmarks.kv.__main__ import step_bytes
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.parity import compare_logits
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.export import export_onnx
from soco_export.model.load import load_model
from soco_export.onnx.inspect import cache_bytes
from soco_export.onnx.settings import CacheType, ExportSettings
from soco_export.recipe.load import load_recipe
from soco_train.data.corpus import load_blocks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="a recipe")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--compared", type=int, default=8, help="blocks whose logits are compared")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.model, arguments.settings)
    model, tokenizer = load_model(recipe)
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens.numpy()
    found: dict[str, Any] = {"command": f"python -m benchmarks.kv.rounded {' '.join(sys.argv[1:])}", "rows": {}}
    whole: list[np.ndarray] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        save_checkpoint(model.float(), tokenizer, work / "hf")
        for cache in get_args(CacheType):
            settings = ExportSettings(flavour="contrib", cache=cache, layouts=("ort",))
            export_onnx(work / "hf", work / cache, settings, calibration=lambda: calibration)
            decoder = OnnxDecoder(work / cache)
            logits = [decoder.logits(block[None])[0] for block in evaluation[: arguments.compared]]
            whole = whole or logits
            pairs = [compare_logits(*pair) for pair in zip(whole, logits, strict=True)]
            found["rows"][cache] = {
                "perplexity": measure_perplexity(decoder, evaluation).value,
                "kl": float(np.mean([pair.mean_kl for pair in pairs])),
                "cache_bytes_a_token": cache_bytes(work / cache),
                "step_bytes": step_bytes(work / cache, model.config),
            }
            print(cache, found["rows"][cache], flush=True)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
