"""How often the benchmark sees a difference that is not there: dense against a byte-identical copy, on a busy machine.

    python -m benchmarks.noise --times 100 --out benchmarks/results/noise.json

exports the built-in model, copies the folder, and lets `soco-export bench`'s own measurement compare the two again and
again, while another process computes in bursts of random length. The truth is 1: of 95 % intervals some 5 in 100 may
exclude it. Gates at 0.9 and 1.1 are judged too: the first may pass or be inconclusive, the second fail or be
inconclusive; anything else is a wrong verdict.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from soco_export.bench.machine import describe_machine
from soco_export.bench.runner import measure_latency
from soco_export.bench.settings import BenchSettings
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.model.source import fetch_folder
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_export.report.gates import GateSettings, judge

PAST = 64
SPEEDUP = f"latency.workloads.decode_{PAST}.speedup"
GATES = {0.9: "failed", 1.0: "", 1.1: "passed"}  # threshold → the verdict that would be wrong of a truth of 1
Z = 1.96


def main() -> None:
    """Measure and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=2.0, help="of each comparison; a run's default is 10")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--load", type=int, default=1, help="processes that compute in bursts meanwhile")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    settings = BenchSettings(
        seconds=options.seconds, prefill=(16,), past=(PAST,), cold_starts=0, roofline=False, memory=False
    )
    with tempfile.TemporaryDirectory() as work, busy(options.load):
        dense, copy = Path(work) / "dense", Path(work) / "copy"
        export_onnx(fetch_folder(load_recipe("tiny")), dense, ExportSettings())
        shutil.copytree(dense, copy)
        found = [compare(dense, copy, settings, options.threads, index) for index in range(options.times)]
    options.out.write_text(json.dumps(summary(found, options), indent=1) + "\n", encoding="utf-8")


def compare(dense: Path, copy: Path, settings: BenchSettings, threads: int, index: int) -> dict[str, Any]:
    """Measure both workloads once; return value, interval and verdicts of each."""
    figures = measure_latency(dense, copy, settings, CPU, threads)
    entry: dict[str, Any] = {}
    for name, work in figures.workloads.items():
        ratio, key = work.speedup, f"latency.workloads.decode_{name}.speedup"
        numbers = {f"{key}.{field}": getattr(ratio, field) for field in ("value", "low", "high")}
        verdicts = {limit: judge(numbers, GateSettings(min_decode_speedup=limit))[0].state for limit in GATES}
        entry[name] = {**asdict(ratio), "control": asdict(work.control), "verdicts": verdicts}
    print(index, {name: f"{e['value']:.3f} ({e['low']:.3f} … {e['high']:.3f})" for name, e in entry.items()})
    return entry


def summary(found: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """Return the counts, what they were counted on, and every interval."""
    workloads = {name: _counts([entry[name] for entry in found]) for name in found[0]}
    return {
        "command": "python -m benchmarks.noise " + " ".join(sys.argv[1:]),
        "machine": asdict(describe_machine(options.threads)),
        "load": options.load,
        "workloads": workloads,
        "comparisons": found,
    }


def _counts(entries: list[dict[str, Any]]) -> dict[str, Any]:
    excluded = sum(not entry["low"] <= 1 <= entry["high"] for entry in entries)
    share, n = excluded / len(entries), len(entries)
    spread = Z * (share * (1 - share) / n) ** 0.5
    verdicts = {limit: Counter(entry["verdicts"][limit] for entry in entries) for limit in GATES}
    return {
        "comparisons": n,
        "intervals that exclude 1": excluded,
        "share": share,
        "share_interval": [max(0.0, share - spread), min(1.0, share + spread)],
        "wrong verdicts": sum(verdicts[limit][wrong] for limit, wrong in GATES.items()),
        "verdicts": {str(limit): dict(counts) for limit, counts in verdicts.items()},
        "median half width": float(np.median([(entry["high"] - entry["low"]) / 2 for entry in entries])),
    }


@contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep that many processes computing in bursts."""
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_bursts, args=(seed,), daemon=True) for seed in range(processes)]
    for worker in workers:
        worker.start()
    try:
        yield
    finally:
        for worker in workers:
            worker.kill()
            worker.join()


def _bursts(seed: int) -> None:
    """Multiply matrices for a while, rest for a while: up to a second each, as a build or another server would."""
    chance, matrix = random.Random(seed), np.random.default_rng(seed).standard_normal((256, 256))
    while True:
        end = time.perf_counter() + chance.uniform(0.05, 1.0)
        while time.perf_counter() < end:
            matrix = np.tanh(matrix @ matrix.T)
        time.sleep(chance.uniform(0.05, 1.0))


if __name__ == "__main__":
    main()
