"""One series: several ONNX folders (and PyTorch models) that take turns at the same passes, each against the first."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from soco_export.bench.roofline import bytes_per_decode_step
from soco_export.bench.runner import Rounds, Run, Workload, interleave, prepare
from soco_export.bench.stats import paired_ratio
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.settings import CPU
from soco_export.files.names import MODEL_FILE
from soco_export.onnx.inspect import summarise_graph

WORKLOADS = (Workload(1, 128), Workload(512, 0))
SAMPLES = {"decode_128": 4, "prefill_512": 1}
ROUNDS = (10, 40)  # fewer say little about a shared machine


@dataclass(frozen=True)
class Entry:
    """One model of a series. `bytes`: read for a decode step; `flops`: of a prefill; both None outside our graphs.

    `milliseconds`: median of a pass by workload; `speedups`: (value, low, high) against the first model, by workload;
    `rounds`: how often it had its turn; `placement`: which provider ran how many nodes.
    """

    name: str
    disk: int
    bytes: int | None
    flops: int | None
    milliseconds: Mapping[str, float]
    speedups: Mapping[str, tuple[float, float, float]]
    rounds: Mapping[str, int]
    remark: str = ""
    placement: str = ""


def measure(
    folders: Mapping[str, Path],
    others: Mapping[str, Any],
    threads: int,
    seconds: float,
    provider: str = CPU,
    openings: int = 1,
) -> list[Entry]:
    """Time everything in turns, about `seconds` for each workload; `others` are further Decoders by name.

    `openings`: how often the sessions are opened anew, each time in another order; the rounds are those of all. Where
    the weights come to lie in memory makes one session of a small model some percent faster than another of the same.
    Raises MachineError if a node of a folder does not run on `provider`.
    """
    names = [*folders, *others]
    found: dict[str, dict[str, list[list[float]]]] = {name: {work.name: [] for work in WORKLOADS} for name in names}
    placed: dict[str, str] = {}
    for turn in range(openings):
        order = names[turn % len(folders) : len(folders)] + names[: turn % len(folders)]
        opened = {name: OnnxDecoder(folders[name], provider, threads, name) for name in order}
        placed = {name: decoder.placement.summary() for name, decoder in opened.items()}
        for work, series in _series([(opened | dict(others))[name] for name in names], seconds / openings, openings):
            for name, times in zip(names, series, strict=True):
                found[name][work] += times
        del opened  # before the next are opened beside them
    entries = [_entry(name, folders.get(name), times, found[names[0]]) for name, times in found.items()]
    return [replace(entry, placement=placed.get(entry.name, "")) for entry in entries]


def _series(decoders: list[Any], seconds: float, openings: int) -> Iterator[tuple[str, tuple[Rounds, ...]]]:
    """Yield each workload with the rounds of every decoder."""
    for work in WORKLOADS:
        prompt = np.random.default_rng(0).integers(0, 1000, (1, work.past + work.tokens))
        runs = [prepare(decoder, work, prompt) for decoder in decoders]
        samples = SAMPLES[work.name]
        yield work.name, interleave(runs, _rounds(runs, samples, seconds, openings), warmup=1, samples=samples)


def _rounds(runs: list[Run], samples: int, seconds: float, openings: int) -> int:
    start = time.perf_counter()
    for run in runs:
        run()
    once = (time.perf_counter() - start) * samples
    return -(-int(np.clip(openings * seconds / once, *ROUNDS)) // openings)


def _entry(
    name: str, folder: Path | None, times: Mapping[str, list[list[float]]], first: Mapping[str, list[list[float]]]
) -> Entry:
    ratios = {work: paired_ratio(first[work], rounds) for work, rounds in times.items()}
    return Entry(
        name=name,
        disk=sum(file.stat().st_size for file in folder.glob("model.onnx*")) if folder else 0,
        bytes=bytes_per_decode_step(folder / MODEL_FILE, WORKLOADS[0].past) if folder else None,
        flops=prefill_flops(folder, WORKLOADS[1].tokens) if folder else None,
        milliseconds={work: float(np.median(rounds)) for work, rounds in times.items()},
        speedups={work: (ratio.value, ratio.low, ratio.high) for work, ratio in ratios.items()},
        rounds={work: len(rounds) for work, rounds in times.items()},
    )


def prefill_flops(folder: Path, tokens: int) -> int:
    """Return the arithmetic of a prefill: weight products for each token, the head for the last, and attention."""
    graph = onnx.load(str(folder / MODEL_FILE), load_external_data=False).graph
    cache = [entry.type.tensor_type.shape for entry in graph.input if entry.name.endswith(".key")]
    logits = next(entry for entry in graph.output if entry.name == "logits").type.tensor_type.shape.dim
    inner = {node.op_type: node for node in graph.node}
    attention = inner.get("GroupQueryAttention") or inner.get("Attention")
    if attention is None:
        return 0
    heads = next(a.i for a in attention.attribute if a.name in ("num_heads", "q_num_heads"))
    hidden = heads * cache[0].dim[3].dim_value
    every = summarise_graph(folder).flops_per_token
    head = 2 * logits[2].dim_value * _width(graph)
    once = logits[1].dim_value == 1
    return (every - head) * tokens + head * (1 if once else tokens) + len(cache) * 4 * tokens * tokens * hidden


def _width(graph: onnx.GraphProto) -> int:
    """Return the width of the model: the size of its norms' scales."""
    norm = next(node for node in graph.node if "Normalization" in node.op_type)
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    return int(next(sizes[name][0] for name in norm.input if len(sizes.get(name, ())) == 1))
