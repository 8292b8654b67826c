"""Dense int4 as onnxruntime-genai's builder writes it beside ours, dense and low rank, at several widths.

    python -m benchmarks.speed.int4 --models smollm2 1b 7b

As like as can be: contrib operators, blocks of 32, symmetric, the token table in int4, logits of every position, and
what the builder always does, `export.pack` (q, k and v in one product). `as shipped` is ours by its defaults: products
apart and the table in int8. Random weights (models.py); all models of a series take turns. Beside the ratios: which
operators a decode step's time goes to, and how much of the memory's bandwidth it reaches.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.speed.models import MODELS, RandomModel, architecture_of, forms_of, uniform_plan
from benchmarks.speed.others import with_cache_sizes, write_genai
from benchmarks.speed.series import Entry, measure
from benchmarks.speed.table import markdown
from soco_export.bench.machine import describe_machine
from soco_export.bench.roofline import measure_bandwidth
from soco_export.checkpoint.writer import save_dense
from soco_export.files.atomic import write_atomic
from soco_export.files.names import MODEL_FILE
from soco_export.model.load import load_tokenizer
from soco_export.onnx.build import write_graph
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_export.recipe.load import load_recipe
from soco_train.events import silent

OUT = Path(__file__).parent / "results" / "int4"
THEIRS = "dense, onnxruntime-genai"
KEEPS = (0.8, 0.6)
LIKE = ExportSettings(
    flavour="contrib", weights="int4", pack=True, layouts=("optimum",), quantize=QuantizeSettings(embedding="int4")
)
SHIPPED = ExportSettings(flavour="contrib", weights="int4", layouts=("optimum",))
STEPS = 24  # of the profile
OPENINGS = 6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure a series for each model and write its JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.int4")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["smollm2", "1b", "7b"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40, help="for one workload of one series")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.models:
        with TemporaryDirectory() as work:
            folders = write_folders(name, Path(work))
            entries = measure(folders, {}, options.threads, options.seconds, openings=OPENINGS)
            document = {
                "command": f"python -m benchmarks.speed.int4 --models {name} --seconds {options.seconds:g}",
                "machine": asdict(describe_machine(options.threads)),
                "bandwidth": measure_bandwidth(options.threads),
                "entries": [asdict(entry) for entry in entries],
                "profiles": {each: decode_profile(folder, options.threads) for each, folder in folders.items()},
            }
        write_atomic(options.out / f"{name}.json", json.dumps(document, indent=1) + "\n")
        print(markdown(name, document["entries"], document["bandwidth"]))
        print(_profiles(entries, document["profiles"]), flush=True)


def write_folders(name: str, work: Path) -> dict[str, Path]:
    """Write every graph of a model; theirs is first, what all others are compared with."""
    architecture = architecture_of(name, work / "config")
    multiple = min(32, MODELS[name]["hidden_size"] // 16)
    folders = {THEIRS: _theirs(name, work)}
    rows = {"dense": (LIKE, {})} | {
        f"{keep:g} stacked": (LIKE, forms_of(uniform_plan(architecture, keep, "stacked", multiple))) for keep in KEEPS
    }
    rows["dense, as shipped"] = (SHIPPED, {})
    for row, (settings, forms) in rows.items():
        folders[row] = write_own(architecture, forms, work / "config", work / row.replace(" ", "-"), settings)
    return folders


def write_own(
    architecture: Architecture, forms: Mapping[str, Any], config: Path, out: Path, settings: ExportSettings
) -> Path:
    """Write a graph of ours with random weights into `out`, beside a copy of the folder `config`."""
    shutil.copytree(config, out)
    write_graph(architecture, RandomModel(architecture, forms), settings, out, silent)
    return out


def _theirs(name: str, work: Path) -> Path:
    """Return what the builder makes of a folder of the same sizes, which is deleted when it has been read."""
    config = AutoConfig.from_pretrained(work / "config")
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    save_dense(model, load_tokenizer(load_recipe("tiny")), work / "hf")
    del model
    write_genai(work / "hf", "int4", work / "genai")
    shutil.rmtree(work / "hf")
    return with_cache_sizes(work / "genai", MODELS[name])


def decode_profile(folder: Path, threads: int) -> dict[str, float]:
    """Return the milliseconds of each operator's kernels in a decode step on 128 tokens, the median over the steps."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling = threads, True
    with TemporaryDirectory() as place:
        options.profile_file_prefix = str(Path(place) / "profile")
        session = ort.InferenceSession(str(folder / MODEL_FILE), options, providers=["CPUExecutionProvider"])
        feeds = _decode_feeds(session)
        for _ in range(STEPS):
            session.run(None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    taken: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            taken[event["args"]["op_name"]][event["name"]].append(event["dur"])
    of_step = {kind: sum(float(np.median(times)) for times in nodes.values()) for kind, nodes in taken.items()}
    return {kind: round(time / 1000, 4) for kind, time in sorted(of_step.items(), key=lambda one: -one[1])}


def _decode_feeds(session: ort.InferenceSession, past: int = 128) -> dict[str, np.ndarray]:
    """Return one new token on a cache of `past`."""
    feeds: dict[str, np.ndarray] = {}
    for entry in session.get_inputs():
        if entry.name.startswith("past_key_values."):
            feeds[entry.name] = np.zeros((1, entry.shape[1], past, entry.shape[3]), np.float32)
        elif entry.name == "attention_mask":
            feeds[entry.name] = np.ones((1, past + 1), np.int64)
        else:
            feeds[entry.name] = np.full((1, 1), past if entry.name == "position_ids" else 5, np.int64)
    return feeds


def _profiles(entries: Sequence[Entry], profiles: Mapping[str, Mapping[str, float]]) -> str:
    lines = []
    for entry in entries:
        largest = " · ".join(f"{kind} {time:.2f}" for kind, time in list(profiles[entry.name].items())[:4])
        lines.append(f"{entry.name}: {largest} ms")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
