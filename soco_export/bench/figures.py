"""What the benchmark measures, as plain data: readable without PyTorch or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from soco_export.bench.stats import Ratio, Summary

PEAK_METHOD = "high-water mark of a process that opens the model alone, runs one prefill and one decode step"


@dataclass(frozen=True)
class Machine:
    """`threads`: what ONNX Runtime was pinned to; `versions`: of the packages that are installed."""

    cpu: str
    cores: int
    memory_bytes: int
    gpu: str | None
    platform: str
    threads: int
    versions: Mapping[str, str]


@dataclass(frozen=True)
class PeakMemory:
    """Bytes. `peak`: the process's high-water mark; `interpreter`: the same before the model was opened."""

    peak: int
    interpreter: int
    method: str = PEAK_METHOD


@dataclass(frozen=True)
class MemoryFigures:
    """Peak memory of each model in a process of its own; `ratio` = compressed / dense."""

    dense: PeakMemory
    compressed: PeakMemory
    ratio: float


@dataclass(frozen=True)
class Roofline:
    """One model's decode step against the ceiling.

    `bytes_per_step`: weights and cache read for one token; `bandwidth`: measured, bytes/s; `ideal_ms`: their
    quotient; `efficiency`: ideal / measured time (1: at the ceiling).
    """

    bytes_per_step: int
    bandwidth: float
    ideal_ms: float
    measured_ms: float
    efficiency: float


@dataclass(frozen=True)
class WorkloadFigures:
    """One workload: milliseconds per pass, tokens/s at the median, and how many times faster the compressed is.

    A pass is a prompt's prefill (its time is the time to first token, TTFT) where `past` is 0, else one decode step
    (time per output token, TPOT). `control`: a second copy of the dense model in the same rounds, truly 1; None where
    it was not timed.
    """

    tokens: int
    past: int
    dense: Summary
    compressed: Summary
    dense_tokens_per_s: float
    compressed_tokens_per_s: float
    speedup: Ratio
    control: Ratio | None = None


@dataclass(frozen=True)
class ColdStart:
    """Milliseconds, medians over `openings` sessions: to load the model, and then to the prompt's first token.

    `tokens`: the prompt's length. The files are in the system's cache; with the first token buffers are allocated too.
    """

    openings: int
    tokens: int
    load_ms: float
    first_token_ms: float


@dataclass(frozen=True)
class LatencyFigures:
    """All workloads by name, those skipped with the reason, and how the decode steps stand to the ceiling.

    `rounds`: the fewest that a workload had; `cold_start` and `placement` (provider → operator → nodes) by model,
    "dense" and "compressed".
    """

    provider: str
    threads: int
    rounds: int
    workloads: Mapping[str, WorkloadFigures]
    skipped: Mapping[str, str]
    roofline: Mapping[str, Roofline]
    cold_start: Mapping[str, ColdStart] = field(default_factory=dict)
    placement: Mapping[str, Mapping[str, Mapping[str, int]]] = field(default_factory=dict)
