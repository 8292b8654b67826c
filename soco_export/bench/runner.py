"""Latency of the dense ONNX model against the compressed one, in strictly interleaved rounds.

Both sessions live in this process and take turns, first dense, then compressed, and the other way round in the next
round, so that drift hits both alike. Only ratios inside one such series mean anything.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soco_export.bench.figures import LatencyFigures, MemoryFigures, Roofline, WorkloadFigures
from soco_export.bench.memory import measure_peak_memory
from soco_export.bench.roofline import bytes_per_decode_step, measure_bandwidth, roofline
from soco_export.bench.settings import BenchSettings
from soco_export.bench.stats import paired_ratio, summarise
from soco_export.evaluate.decoder import IntArray
from soco_export.evaluate.session import DEVICES, MODEL_FILE, OnnxDecoder
from soco_train.events import Event, Notify, silent

Run = Callable[[], None]
Rounds = list[list[float]]


@dataclass(frozen=True)
class Workload:
    """`tokens` new tokens on a cache of `past` tokens: a prefill where past is 0, else a decode step."""

    tokens: int
    past: int

    @property
    def name(self) -> str:
        """prefill_128, decode_128: the number is the prompt's, or the cache's, length."""
        return f"decode_{self.past}" if self.past else f"prefill_{self.tokens}"


def plan_workloads(settings: BenchSettings, context: int | None) -> tuple[list[Workload], dict[str, str]]:
    """Return the workloads that fit the model's `context` (None: unlimited) and the reasons for those that do not."""
    wanted = [*(Workload(tokens, 0) for tokens in settings.prefill), Workload(1, settings.past)]
    fitting = [w for w in wanted if context is None or w.tokens + w.past <= context]
    skipped = {w.name: f"the model's context ends at {context} tokens" for w in wanted if w not in fitting}
    return fitting, skipped


def measure_latency(
    dense: Path,
    compressed: Path,
    settings: BenchSettings,
    provider: str,
    threads: int,
    notify: Notify = silent,
) -> LatencyFigures:
    """Time two ONNX folders against each other; see OnnxDecoder for what it raises."""
    config = _config(compressed)
    workloads, skipped = plan_workloads(settings, config.get("max_position_embeddings"))
    decoders = [OnnxDecoder(folder, provider, threads, folder.name) for folder in (dense, compressed)]
    figures: dict[str, WorkloadFigures] = {}
    for index, workload in enumerate(workloads):
        prompt = _prompt(workload.past + workload.tokens, config["vocab_size"])
        runs = [prepare(decoder, workload, prompt) for decoder in decoders]
        samples = settings.decode_samples if workload.past else 1
        times = interleave((runs[0], runs[1]), settings.rounds, settings.warmup, samples)
        figures[workload.name] = _figures(workload, times[0], times[1])
        notify(Event("bench", index + 1, len(workloads), {workload.name: figures[workload.name].speedup.value}))
    ceiling = _rooflines((dense, compressed), figures, provider, threads) if settings.roofline else {}
    return LatencyFigures(provider, threads, settings.rounds, figures, skipped, ceiling)


def measure_memory(
    dense: Path, compressed: Path, settings: BenchSettings, provider: str, threads: int
) -> MemoryFigures:
    """Measure the peak memory of both folders, one after the other, for the first prefill that fits and a step."""
    tokens = memory_prompt(settings, _config(compressed).get("max_position_embeddings"))
    first = measure_peak_memory(dense, provider, threads, tokens)
    second = measure_peak_memory(compressed, provider, threads, tokens)
    return MemoryFigures(first, second, second.peak / first.peak)


def memory_prompt(settings: BenchSettings, context: int | None) -> int:
    """Return the first prefill length that leaves room for a decode step in `context`, or all but that one token."""
    if context is None:
        return settings.prefill[0]
    workloads, _ = plan_workloads(settings, context - 1)
    return next((work.tokens for work in workloads if not work.past), context - 1)


def _config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return found


def _prompt(tokens: int, vocabulary: int) -> IntArray:
    return np.random.default_rng(0).integers(0, vocabulary, (1, tokens))


def prepare(decoder: OnnxDecoder, workload: Workload, prompt: IntArray) -> Run:
    """Bind a workload so that only the pass itself is timed; a decode step follows a real prefill."""
    decoder.release()
    if workload.past:
        decoder.prefill(prompt[:, : workload.past])
    run = decoder.repeatable(prompt[:, workload.past :])
    decoder.release()
    return run


def interleave(runs: Sequence[Run], rounds: int, warmup: int, samples: int) -> tuple[Rounds, ...]:
    """Time all in turns, `samples` of each per round, another one first in each; milliseconds, [rounds][samples]."""
    times: tuple[Rounds, ...] = tuple([] for _ in runs)
    for index in range(warmup + rounds):
        first = index % len(runs)
        for which in (*range(first, len(runs)), *range(first)):
            found = [_time(runs[which]) for _ in range(samples)]
            if index >= warmup:
                times[which].append(found)
    return times


def _time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _figures(workload: Workload, dense: Rounds, compressed: Rounds) -> WorkloadFigures:
    flat = [[sample for samples in rounds for sample in samples] for rounds in (dense, compressed)]
    per_second = [1e3 * workload.tokens / float(np.median(samples)) for samples in flat]
    return WorkloadFigures(
        tokens=workload.tokens,
        past=workload.past,
        dense=summarise(flat[0]),
        compressed=summarise(flat[1]),
        dense_tokens_per_s=per_second[0],
        compressed_tokens_per_s=per_second[1],
        speedup=paired_ratio(dense, compressed),
    )


def _rooflines(
    folders: tuple[Path, Path], figures: Mapping[str, WorkloadFigures], provider: str, threads: int
) -> dict[str, Roofline]:
    decode = next((entry for entry in figures.values() if entry.past), None)
    if decode is None:
        return {}
    bandwidth = measure_bandwidth(threads, DEVICES.get(provider, "cpu"))
    measured = {"dense": decode.dense.p50, "compressed": decode.compressed.p50}
    return {
        name: roofline(bytes_per_decode_step(folder / MODEL_FILE, decode.past), bandwidth, p50)
        for (name, p50), folder in zip(measured.items(), folders, strict=True)
        if p50 is not None
    }
