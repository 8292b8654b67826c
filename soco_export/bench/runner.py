"""Latency of the dense ONNX model against the compressed one, in strictly interleaved rounds.

All sessions live in this process and take turns, another one first in each round, so that drift hits all alike. Only
ratios inside one such series mean anything. A second copy of the dense model takes turns too (an A/A test): its ratio
to the first is truly 1, so what is found for it is the machine's noise, and widens the interval of what matters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soco_export.bench.cold import measure_cold_starts
from soco_export.bench.figures import ColdStart, LatencyFigures, MemoryFigures, Roofline, WorkloadFigures
from soco_export.bench.memory import measure_peak_memory
from soco_export.bench.roofline import bytes_per_decode_step, measure_bandwidth, roofline
from soco_export.bench.settings import BenchSettings
from soco_export.bench.stats import paired_ratio, summarise_rounds
from soco_export.evaluate.decoders.decoder import IntArray
from soco_export.evaluate.decoders.session import DEVICES, OnnxDecoder, Placement
from soco_export.files.json import read_config
from soco_export.files.names import MODEL_FILE
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent

Run = Callable[[], None]
Rounds = list[list[float]]
SLICE = 0.01  # seconds: longer than a scheduler's time slice, so that being interrupted is not what a turn consists of


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
    wanted = [*(Workload(tokens, 0) for tokens in settings.prefill), *(Workload(1, past) for past in settings.past)]
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
    folders = {"dense": dense, "compressed": compressed} | ({"control": dense} if settings.control else {})
    said = [folder for folder in (dense, compressed) if folder == compressed or (folder / "config.json").is_file()]
    vocabulary = min(map(_vocabulary, said))  # a reference of somebody else's may say nothing
    prompts = {work: _prompt(work.past + work.tokens, vocabulary) for work in workloads}
    cold = _cold_starts({"dense": dense, "compressed": compressed}, prompts, settings.cold_starts, provider, threads)
    decoders = {name: OnnxDecoder(folder, provider, threads, folder.name) for name, folder in folders.items()}
    figures: dict[str, WorkloadFigures] = {}
    for index, (workload, prompt) in enumerate(prompts.items()):
        runs = [prepare(decoder, workload, prompt) for decoder in decoders.values()]
        samples = settings.decode_samples if workload.past else 1
        times = interleave(runs, settings.rounds, settings.warmup, samples, settings.seconds)
        figures[workload.name] = _figures(workload, *times)
        notify(Event("bench", index + 1, len(workloads), {workload.name: figures[workload.name].speedup.value}))
    return LatencyFigures(
        provider=provider,
        threads=threads,
        rounds=min((work.speedup.rounds for work in figures.values()), default=settings.rounds),
        workloads=figures,
        skipped=skipped,
        roofline=_rooflines((dense, compressed), figures, provider, threads) if settings.roofline else {},
        cold_start=cold,
        placement={name: _plain(decoders[name].placement) for name in ("dense", "compressed")},
    )


def _plain(placement: Placement) -> dict[str, dict[str, int]]:
    return {provider: dict(operators) for provider, operators in placement.nodes.items()}


def _cold_starts(
    folders: Mapping[str, Path], prompts: Mapping[Workload, IntArray], openings: int, provider: str, threads: int
) -> dict[str, ColdStart]:
    """Measure cold starts with the first prompt that fits; none without one."""
    prompt = next((prompt for work, prompt in prompts.items() if not work.past), None)
    return {} if prompt is None else measure_cold_starts(folders, prompt, openings, provider, threads)


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
    return read_config(folder)


def _vocabulary(folder: Path) -> int:
    """Return how many tokens the model in `folder` has; DataError where its config.json does not say."""
    size = _config(folder).get("vocab_size")
    if type(size) is not int or size < 1:
        raise DataError(
            f"config.json sets vocab_size to {size}",
            fix="put the config.json there that was exported with the model",
            where=str(folder / "config.json"),
        )
    return size


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


def interleave(runs: Sequence[Run], rounds: int, warmup: int, samples: int, seconds: float = 0.0) -> tuple[Rounds, ...]:
    """Time all in turns, until there are `rounds` and `seconds` are over; milliseconds, [rounds][samples].

    In each round each has a turn of `samples` passes or, where `seconds` are asked for, of SLICE seconds, if that is
    more; another one is first, and every other cycle goes backwards, so that nobody always follows the same one.
    """
    times: tuple[Rounds, ...] = tuple([] for _ in runs)
    least = SLICE if seconds else 0.0
    for index in range(warmup):
        for which in _turns(index, len(runs)):
            _turn(runs[which], samples, least)
    start = time.perf_counter()
    while len(times[0]) < rounds or time.perf_counter() - start < seconds:
        for which in _turns(warmup + len(times[0]), len(runs)):
            times[which].append(_turn(runs[which], samples, least))
    return times


def _turns(index: int, count: int) -> list[int]:
    first = index % count
    order = [*range(first, count), *range(first)]
    return order[::-1] if index // count % 2 else order


def _turn(run: Run, samples: int, least: float) -> list[float]:
    found: list[float] = []
    end = time.perf_counter() + least
    while len(found) < samples or time.perf_counter() < end:
        found.append(_time(run))
    return found


def _time(run: Run) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def _figures(workload: Workload, dense: Rounds, compressed: Rounds, again: Rounds | None = None) -> WorkloadFigures:
    """Summarise a series; `again`: the second copy of the dense model."""
    control = None if again is None else paired_ratio(dense, again)
    summaries = summarise_rounds(dense), summarise_rounds(compressed)
    per_second = [1e3 * workload.tokens / float(np.median(np.concatenate(times))) for times in (dense, compressed)]
    return WorkloadFigures(
        tokens=workload.tokens,
        past=workload.past,
        dense=summaries[0],
        compressed=summaries[1],
        dense_tokens_per_s=per_second[0],
        compressed_tokens_per_s=per_second[1],
        speedup=paired_ratio(dense, compressed, control=control),
        control=control,
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
