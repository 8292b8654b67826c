"""Results in a sentence: the verdict, what became of size, speed and quality; and the few figures of a headline."""

from __future__ import annotations

from collections.abc import Iterator

from soco_export.bench.figures import LatencyFigures
from soco_export.report.gates import WORSE
from soco_export.report.rendering import number
from soco_export.report.schema import PerplexityResults, Results


def verdict_line(results: Results) -> str:
    """Return the answer in a line: "PASSED: 5 of 6 gates, 1 inconclusive (min_decode_speedup)"."""
    verdicts = results.verdicts
    if not verdicts:
        return "NOT JUDGED: the recipe sets no gate"
    named = {state: [verdict.name for verdict in verdicts if verdict.state == state] for state in WORSE}
    unsure = f", {len(named['inconclusive'])} inconclusive ({', '.join(named['inconclusive'])})"
    tail = unsure if named["inconclusive"] else ""
    if named["failed"]:
        return f"FAILED: {len(named['failed'])} of {len(verdicts)} gates ({', '.join(named['failed'])}){tail}"
    return f"PASSED: {len(named['passed'])} of {len(verdicts)} gates{tail}"


def verdict_sentence(results: Results) -> str:
    """Return verdict and figures in a sentence; a speed-up counts only where its interval excludes 1.

    "PASSED: 3 of 3 gates. 0.69 × the bytes, decode 1.13 × as fast on 2 threads, perplexity 1.045 × dense on …."
    """
    found = figures_sentence(results)
    return f"{verdict_line(results)}. {found}" if found else f"{verdict_line(results)}."


def figures_sentence(results: Results) -> str:
    """Return size, speed and quality beside the dense model in a sentence, "" if nothing was measured."""
    parts = [*_bytes_part(results), *_speed_part(results)]
    if results.perplexity:
        parts.append(_perplexity_part(results.perplexity))
    return f"{', '.join(parts)}." if parts else ""


def _perplexity_part(found: PerplexityResults) -> str:
    low, high = found.ratio_interval or (found.ratio, found.ratio)
    if low < 1 < high:
        return f"perplexity {found.ratio:.3f} × dense, within the noise ({low:.3f} to {high:.3f} ×), on {found.text}"
    return f"perplexity {found.ratio:.3f} × dense on {found.text}"


def _bytes_part(results: Results) -> Iterator[str]:
    if results.sizes.bytes_ratio is not None:
        yield f"{results.sizes.bytes_ratio:.2f} × the bytes"


def _speed_part(results: Results) -> Iterator[str]:
    latency = results.latency
    for name, work in (latency.workloads if latency else {}).items():
        if latency and name.startswith("decode"):
            where = f"on {latency.threads} thread{'s' if latency.threads != 1 else ''}"
            after = f" after {number(work.past)} tokens" if _decodes(latency) > 1 else ""
            speed = work.speedup
            ends = f"{speed.low:.2f} to {speed.high:.2f} ×"
            if speed.within_noise:
                yield f"decode{after} as fast as dense, within the noise ({ends}) {where}"
            else:
                yield f"decode{after} {speed.value:.2f} × as fast {where}"


def _decodes(latency: LatencyFigures) -> int:
    return sum(name.startswith("decode") for name in latency.workloads)


def origin(results: Results) -> str:
    """Return which model this is, and in which form."""
    model = results.model
    revision = f" at {model.revision}" if model.revision else ""
    return f"{model.architecture} from {model.source}{revision}, written as {results.format}."
