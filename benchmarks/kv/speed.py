"""CPU time of a decode step with a smaller cache beside the whole one: refine.values in standard, integers in contrib.

    python -m benchmarks.kv.speed --out benchmarks/kv/speed.json

Time of the one thread that computes, not of the clock: what else the machine does takes turns with it and is not
counted (what it takes of the processor's caches is). Steps after `--past` tokens, at most as many as the context holds,
in interleaved rounds with a second copy of the whole one, whose ratio is truly 1 and widens the interval. Projections
from little text: their numbers cost no time.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from soco_export.bench.runner import Run, Workload, prepare
from soco_export.bench.stats import paired_ratio
from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.export import export_onnx
from soco_export.files.names import ROUNDED_CACHE
from soco_export.model.load import load_model
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_train.data.corpus import load_blocks
from soco_train.events import silent
from soco_train.modules.values import value_sites
from soco_train.refine.values import narrow_values
from soco_train.settings.refine import ValueSettings

BLOCKS, SAMPLES = 4, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="a recipe")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--past", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--keep", nargs="*", type=float, default=[0.75, 0.5, 0.25], help="refine.values.keep")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.model, arguments.settings)
    model, tokenizer = load_model(recipe)
    tokens = load_blocks(tokenizer, recipe.data, "calibration").tokens[:BLOCKS]
    found: dict[str, Any] = {"command": f"python -m benchmarks.kv.speed {' '.join(sys.argv[1:])}", "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)

        def export(name: str, narrowed: Any, **settings: Any) -> Path:
            save_checkpoint(narrowed, tokenizer, work / f"{name}-hf")
            options = ExportSettings(layouts=("ort",), **settings)
            export_onnx(work / f"{name}-hf", work / name, options, calibration=lambda: tokens)
            return work / name

        def add(name: str, beside: str, whole: Path, small: Path) -> None:
            times = compared(whole, small, model.config, arguments.past, arguments.rounds)
            found["rows"].append({"name": name, "beside": beside, "decode": times})
            print(found["rows"][-1], flush=True)

        whole = export("standard", model.float())
        for keep in arguments.keep:
            small = copy.deepcopy(model)
            sites = value_sites(model)
            apply_factors(small, narrow_values(model, sites, tokens, ValueSettings(keep=keep), silent))
            add(f"refine.values.keep: {keep:g}", "standard", whole, export(f"keep{keep}", small))
        whole = export("contrib", model, flavour="contrib")
        for cache in ROUNDED_CACHE:
            add(f"export.cache: {cache}", "contrib", whole, export(cache, model, flavour="contrib", cache=cache))
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def compared(whole: Path, small: Path, config: Any, lengths: Sequence[int], rounds: int) -> dict[str, dict[str, float]]:
    """Return whole / small CPU time of a step, by the tokens before it."""
    decoders = [OnnxDecoder(folder, threads=1) for folder in (whole, small, whole)]
    found = {}
    for past in (min(length, config.max_position_embeddings - 1) for length in lengths):
        prompt = np.random.default_rng(0).integers(0, config.vocab_size, (1, past + 1))
        work = Workload(1, past)
        times = in_turns([prepare(decoder, work, prompt) for decoder in decoders], rounds)
        ratio = paired_ratio(times[0], times[1], control=paired_ratio(times[0], times[2]))
        found[str(past)] = {"speedup": ratio.value, "low": ratio.low, "high": ratio.high, "rounds": ratio.rounds}
    return found


def in_turns(runs: Sequence[Run], rounds: int) -> list[list[list[float]]]:
    """Return milliseconds of the thread's CPU time, [runs][rounds][samples]; another one begins each round."""
    times: list[list[list[float]]] = [[] for _ in runs]
    for index in range(-2, rounds):
        for offset in range(len(runs)):
            which = (index + offset) % len(runs)
            samples = [_milliseconds(runs[which]) for _ in range(SAMPLES)]
            if index >= 0:
                times[which].append(samples)
    return times


def _milliseconds(run: Run) -> float:
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


if __name__ == "__main__":
    main()
