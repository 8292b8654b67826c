"""Does low rank pay in OpenVINO? Dense and pruned in turns, in one process, on its CPU device.

    python -m benchmarks.speed.openvino --out benchmarks/speed/results/openvino.json

Random weights (models.py) in the standard flavour, token table in floats, every layer stacked at the same share. A row
per type: decode behind `--past` tokens and a prefill of as many, speed against dense with a 95 % interval.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.speed.models import RandomModel, architecture_of, forms_of, uniform_plan
from soco_export.bench.machine import describe_machine
from soco_export.bench.runner import Workload, interleave, prepare
from soco_export.bench.stats import paired_ratio
from soco_export.evaluate.decoders.openvino import OpenVinoDecoder
from soco_export.onnx.build import write_graph
from soco_export.onnx.settings import ExportSettings
from soco_train.events import silent

WEIGHTS = ("same", "int8", "int4")


def decoders(given: argparse.Namespace, weights: str, work: Path) -> list[OpenVinoDecoder]:
    """Return (dense, pruned), open."""
    table = {"embedding": "same"}
    settings = ExportSettings.model_validate({"weights": weights, "quantize": table, "last_token_logits": True})
    architecture = architecture_of(given.model, work / "config")
    plan = forms_of(uniform_plan(architecture, given.keep, "stacked", 32))
    opened = []
    for name, forms in (("dense", {}), ("pruned", plan)):
        folder = work / f"{weights}-{name}"
        folder.mkdir()
        write_graph(architecture, RandomModel(architecture, forms), settings, folder, silent)
        opened.append(OpenVinoDecoder(folder, given.threads, name))
    return opened


def main() -> None:
    """Print the rows, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1b")
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--past", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    rows = []
    workloads = {"decode": Workload(1, given.past), "prefill": Workload(given.past, 0)}
    ids = np.random.default_rng(0).integers(3, 1000, (1, given.past + 1))
    for weights in WEIGHTS:
        with tempfile.TemporaryDirectory() as work:
            pair = decoders(given, weights, Path(work))
            for name, workload in workloads.items():
                runs = [prepare(decoder, workload, ids[:, : workload.past + workload.tokens]) for decoder in pair]
                dense, pruned = interleave(runs, given.rounds, warmup=2, samples=1)
                rows.append({"weights": weights, "workload": name, "speedup": asdict(paired_ratio(dense, pruned))})
                print(json.dumps(rows[-1]), flush=True)
    if given.out:
        settings = {name: value for name, value in vars(given).items() if name != "out"}
        document = {"settings": settings, "machine": asdict(describe_machine(given.threads)), "rows": rows}
        given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
