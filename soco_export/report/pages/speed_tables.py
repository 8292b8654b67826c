"""Results → tables of what was timed and weighed: latency, cold start, the memory ceiling, peak memory."""

from __future__ import annotations

from soco_export.bench.figures import LatencyFigures, MemoryFigures, WorkloadFigures
from soco_export.bench.stats import Summary, render_percentile
from soco_export.files.text import human_bytes
from soco_export.report.rendering import Row, Table, number, percent, ratio, speedup


def latency_table(latency: LatencyFigures | None) -> Table | None:
    """Return times, speeds and speed-ups of each workload, with the noise of the machine."""
    if latency is None:
        return None
    rows: list[Row] = []
    for work in latency.workloads.values():
        title = workload_title(work)
        rows.append((title, "dense", *_percentiles(work.dense), number(work.dense_tokens_per_s), ""))
        speed = (*_percentiles(work.compressed), number(work.compressed_tokens_per_s), speedup(work.speedup))
        rows.append((title, "this model", *speed))
        if work.control:
            rows.append((title, "dense against itself (A/A)", "", "", "", "", ratio(work.control)))
    skipped = "".join(f" Skipped {name}: {reason}." for name, reason in latency.skipped.items())
    note = (
        f"ONNX, {latency.provider}, {latency.threads} threads, {latency.rounds} interleaved rounds or more. TTFT: time "
        "to first token; TPOT: time per output token. The speed-up is the median of the rounds' ratios; in brackets "
        "95 % intervals, from blocks of rounds, widened by what a second copy of the dense model measures against the "
        f"first, which is noise. Bold is a difference beyond it.{skipped}"
    )
    return Table("Latency", ("workload", "model", "p50", "p95", "p99", "tokens/s", "speed-up"), tuple(rows), note)


def workload_title(work: WorkloadFigures) -> str:
    """Return what a workload times, as the field calls it."""
    if work.past:
        return f"TPOT: decode step after {number(work.past)} tokens"
    return f"TTFT: prefill of {number(work.tokens)} tokens"


def _percentiles(summary: Summary) -> Row:
    shown = ((summary.p50, summary.p50_interval), (summary.p95, summary.p95_interval), (summary.p99, None))
    return tuple(
        render_percentile(value, summary.n) + (f" ({ends[0]:.4g}–{ends[1]:.4g})" if ends else "")
        for value, ends in shown
    )


def cold_start_table(latency: LatencyFigures | None) -> Table | None:
    """Return how long opening a model and its first token take."""
    if latency is None:
        return None
    names = {"dense": "dense", "compressed": "this model"}
    rows = [
        (
            names.get(model, model),
            f"{cold.load_ms:.4g} ms",
            f"{cold.first_token_ms:.4g} ms",
            f"{cold.load_ms + cold.first_token_ms:.4g} ms",
            f"{cold.tokens} tokens",
            str(cold.openings),
        )
        for model, cold in latency.cold_start.items()
    ]
    note = "Medians; the files were in the system's cache."
    return Table("Cold start", ("model", "load", "first token", "together", "prompt", "openings"), tuple(rows), note)


def ceiling_table(latency: LatencyFigures | None) -> Table | None:
    """Return how far a decode step is from what the memory bandwidth allows."""
    if latency is None or not latency.roofline:
        return None
    rows = [
        (
            name,
            human_bytes(line.bytes_per_step),
            f"{line.ideal_ms:.4g} ms",
            f"{line.measured_ms:.4g} ms",
            percent(line.efficiency),
            f"{line.bandwidth / 1e9:.3g} GB/s",
        )
        for name, line in latency.roofline.items()
    ]
    columns = ("model", "read per step", "ideal", "measured", "of the ceiling", "bandwidth")
    note = (
        "A decode step reads its weights and its cache once; the bandwidth was measured on this machine. "
        "Above 100 %: the model fits into the processor's caches."
    )
    return Table("Distance to the memory ceiling", columns, tuple(rows), note)


def memory_table(memory: MemoryFigures | None) -> Table | None:
    """Return the peak memory of both models."""
    if memory is None:
        return None
    models = {"dense": memory.dense, "this model": memory.compressed}
    rows = [(name, human_bytes(peak.peak), human_bytes(peak.interpreter)) for name, peak in models.items()]
    note = f"{memory.dense.method}; ratio {number(memory.ratio)}."
    return Table("Memory", ("ONNX model", "peak", "of which libraries"), tuple(rows), note)
