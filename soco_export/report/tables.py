"""Results → tables of text, once for every rendering: Markdown, HTML and the console show the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from soco_export.bench.figures import LatencyFigures, MemoryFigures, WorkloadFigures
from soco_export.bench.stats import Ratio, Summary, render_percentile
from soco_export.evaluate.figures import ParityFigures, TaskComparison
from soco_export.evaluate.paired import perplexity_ratio
from soco_export.report.gates import WORSE
from soco_export.report.material import Material
from soco_export.report.schema import ParityResults, PerplexityResults, Results, SizeFigures

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A titled table; `note` says how the figures are to be read."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""


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
            value, low, high = work.speedup.value, work.speedup.low, work.speedup.high
            where = f"on {latency.threads} thread{'s' if latency.threads != 1 else ''}"
            after = f" after {number(work.past)} tokens" if _decodes(latency) > 1 else ""
            if low <= 1 <= high:
                yield f"decode{after} as fast as dense, within the noise ({low:.2f} to {high:.2f} ×) {where}"
            else:
                yield f"decode{after} {value:.2f} × as fast {where}"


def _decodes(latency: LatencyFigures) -> int:
    return sum(name.startswith("decode") for name in latency.workloads)


def changed(results: Results) -> Table:
    """Return what the reader wants first: the dense model beside what ships, and the ratio."""
    sizes, found = results.sizes, results.perplexity
    rows = [_before_after("parameters", sizes.params_before, sizes.params_after)]
    if "onnx-dense" in sizes.bytes and "onnx" in sizes.bytes:
        rows.append(_bytes_row("bytes on disk (ONNX)", sizes.bytes["onnx-dense"], sizes.bytes["onnx"]))
    if found:
        final = found.onnx or found.low_rank
        rows.append(
            (
                "perplexity",
                number(found.dense.value),
                number(final.value),
                _with_ends(f"{found.ratio:.3f} ×", found.ratio_interval),
            )
        )
    for name, task in results.tasks.items():
        kept = "n/a" if task.recovery is None else f"{task.recovery:.3f} ×"
        rows.append((f"{name}, accuracy", percent(task.dense.acc), percent(task.compressed.acc), kept))
    for work in (results.latency.workloads if results.latency else {}).values():
        kind = f"decode after {number(work.past)} tokens" if work.past else f"prefill of {number(work.tokens)} tokens"
        speeds = (f"{number(work.dense_tokens_per_s)} tok/s", f"{number(work.compressed_tokens_per_s)} tok/s")
        rows.append((kind, *speeds, f"{work.speedup.value:.2f} ×{beyond(work.speedup)}"))
    if results.memory:
        peaks = size(results.memory.dense.peak), size(results.memory.compressed.peak)
        rows.append(("peak memory", *peaks, f"{results.memory.ratio:.3f} ×"))
    note = "Speeds: within the noise where the 95 % interval of the ratio contains 1." if results.latency else ""
    return Table("What changed", ("", "dense", "this model", "ratio"), tuple(rows), note)


def origin(results: Results) -> str:
    """Return which model this is, and in which form."""
    model = results.model
    revision = f" at {model.revision}" if model.revision else ""
    return f"{model.architecture} from {model.source}{revision}, written as {results.format}."


def run_table(results: Results, material: Material) -> Table:
    """Return how the run came about: when, by which command, from which text and seed, and how long it took."""
    found = results.provenance
    calibration = found.get("calibration") or {}
    rows: list[Row] = [
        ("begun", str(found.get("started", ""))),
        ("command", material.command),
        ("seed", str(found.get("seed", ""))),
        ("calibration text", str(calibration.get("text", ""))),
    ]
    seconds: Mapping[str, float] = found.get("seconds") or {}
    rows += [(f"stage {name}", f"{taken:,.1f} s") for name, taken in seconds.items()]
    if seconds:
        rows.append(("together", f"{sum(seconds.values()):,.1f} s"))
    return Table("Run", ("", ""), tuple(row for row in rows if row[1]))


def beyond(found: Ratio) -> str:
    """Return " (within the noise)" for a ratio whose interval contains 1."""
    return " (within the noise)" if found.low <= 1 <= found.high else ""


def all_tables(results: Results) -> list[Table]:
    """Return every table of details that has something to show; verdicts and what changed come before them."""
    tables = [
        _sizes(results.sizes),
        _perplexity(results.perplexity),
        _parity(results.parity),
        _tasks(results.tasks),
        _latency(results.latency),
        _cold_start(results.latency),
        _ceiling(results.latency),
        _memory(results.memory),
        _machine(results),
    ]
    return [table for table in tables if table is not None and table.rows]


def headline(results: Results) -> dict[str, dict[str, float | int | None]]:
    """Return the few figures that a model card or a terminal shows: row → column → unrounded number."""
    sizes, perplexity = results.sizes, results.perplexity
    found: dict[str, dict[str, float | int | None]] = {
        "parameters": {"dense": sizes.params_before, "pruned": sizes.params_after}
    }
    if perplexity:
        found["perplexity"] = {"dense": perplexity.dense.value, "pruned": perplexity.low_rank.value}
        if perplexity.onnx:
            found["perplexity"]["ONNX"] = perplexity.onnx.value
    for name, task in results.tasks.items():
        found[f"{name}, accuracy"] = {"dense": task.dense.acc, "pruned": task.compressed.acc}
    for name, work in (results.latency.workloads if results.latency else {}).items():
        found[f"{name}, tokens/s"] = {"dense": work.dense_tokens_per_s, "ONNX": work.compressed_tokens_per_s}
    return found


def number(value: float | int | None) -> str:
    """Return a figure for people: four significant digits, thousands set apart."""
    if value is None:
        return "n/a"
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def size(count: int) -> str:
    """Return bytes for people: "538.1 MB" (decimal)."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}" if units[0] != "B" else f"{count} B"


def ratio_text(value: float, ends: tuple[float, float] | None, digits: int = 3) -> str:
    """Return a ratio with its interval: "1.045 × (1.031–1.060)"."""
    interval = f" ({ends[0]:.{digits}f}–{ends[1]:.{digits}f})" if ends else ""
    return f"{value:.{digits}f} ×{interval}"


def percent(share: float) -> str:
    """Return a share for people; only an exact 1 shows as 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %" if share < 1 else f"{100 * share:.2f} %"


def _sizes(sizes: SizeFigures) -> Table:
    rows = [
        _before_after("parameters, all", sizes.params_before, sizes.params_after),
        _before_after("parameters, selected layers", sizes.selected_before, sizes.selected_after),
        *_bytes_rows(sizes.bytes),
    ]
    left = f"{sizes.layers_dense} of {sizes.layers} selected layers left dense"
    largest = sizes.largest_coefficient
    pivots = "" if largest is None else f" Pivots combine with coefficients of at most {largest:.3g}."
    asked = f"keep_params {sizes.keep_params:g}, stored {sizes.storage}"
    if sizes.keep_bytes is not None:
        written = "" if sizes.file_bytes is None else f" (model.onnx and its data: {sizes.file_bytes:,})"
        asked = f"keep_bytes {sizes.keep_bytes:,}{written}"
    note = f"asked: {asked}; {left}.{pivots}"
    return Table("Size", ("", "dense", "pruned", "ratio"), tuple(rows), note)


def _before_after(name: str, before: int, after: int) -> Row:
    return name, number(before), number(after), f"{after / before:.3f} ×" if before else "n/a"


def _bytes_rows(folders: Mapping[str, int]) -> Iterator[Row]:
    """Yield a row per form: a folder NAME-dense is the dense model in the form of the folder NAME."""
    for name, count in folders.items():
        if f"{name}-dense" in folders:
            yield _bytes_row(f"on disk: {name}", folders[f"{name}-dense"], count)
        elif not name.endswith("-dense"):
            yield f"on disk: {name}", "", size(count), ""


def _bytes_row(name: str, before: int, after: int) -> Row:
    return name, size(before), size(after), f"{after / before:.3f} ×" if before else "n/a"


def _perplexity(perplexity: PerplexityResults | None) -> Table | None:
    if perplexity is None:
        return None
    forms = {"dense": perplexity.dense, "low-rank": perplexity.low_rank, "ONNX": perplexity.onnx}
    rows = [
        (
            name,
            _with_ends(number(form.value), form.interval),
            _with_ends(number(form.value / perplexity.dense.value), perplexity_ratio(perplexity.dense, form)[1]),
            number(form.loss),
            number(form.tokens),
        )
        for name, form in forms.items()
        if form is not None
    ]
    return Table("Perplexity", ("", "perplexity", "/ dense", "loss (nats)", "tokens"), tuple(rows), _text(perplexity))


def _text(perplexity: PerplexityResults) -> str:
    """Say on which text, by which protocol, and what the intervals are."""
    told = perplexity.protocol
    cut = f"blocks of {perplexity.block} tokens"
    if told:
        bos = "BOS before each" if told.bos else "no BOS"
        cut = f"{told.windows} windows of {told.window} tokens, stride {told.stride}, {bos}, the first token given"
        cut += f"; {told.join}" if told.join else ""
    note = f"{perplexity.text}: {cut} (fingerprint {perplexity.fingerprint[:12]})."
    uncertain = " In brackets 95 % intervals over windows; of a ratio, over the windows' differences to dense."
    return note + (uncertain if perplexity.ratio_interval else "")


def _with_ends(text: str, ends: tuple[float, float] | None) -> str:
    return f"{text} ({number(ends[0])}{'–' if ends[0] >= 0 else ' to '}{number(ends[1])})" if ends else text


def _parity(parity: ParityResults) -> Table:
    steps = {"compression (dense → low-rank)": parity.compression, "export (low-rank → ONNX)": parity.export}
    rows: list[Row] = []
    for name, step in steps.items():
        if step is not None:
            rows += [_parity_row(f"{name}, prefill", step.prefill), _parity_row(f"{name}, cached decode", step.decode)]
    greedy = [
        f"greedy tokens kept in the {name.partition(' ')[0]}: {percent(step.greedy_agreement)}"
        for name, step in steps.items()
        if step is not None and step.greedy_agreement is not None
    ]
    columns = ("step", "mean KL", "max KL", "max |Δlogit|", "same top token", "positions")
    return Table("Parity", columns, tuple(rows), "; ".join(greedy) + "." if greedy else "")


def _parity_row(name: str, figures: ParityFigures) -> Row:
    return (
        name,
        f"{figures.mean_kl:.3g}",
        f"{figures.max_kl:.3g}",
        f"{figures.max_logit_difference:.3g}",
        percent(figures.token_agreement),
        number(figures.positions),
    )


def _tasks(tasks: Mapping[str, TaskComparison]) -> Table:
    rows = [
        (
            name,
            f"{number(task.dense.acc)} ± {number(task.dense.stderr)}",
            f"{number(task.compressed.acc)} ± {number(task.compressed.stderr)}",
            _with_ends(number(task.difference), task.difference_interval),
            _with_ends(number(task.recovery), task.recovery_interval),
            f"{number(task.dense.acc_norm)} → {number(task.compressed.acc_norm)}",
            percent(task.agreement) + (f" (κ {task.kappa:.2f})" if task.kappa is not None else ""),
            percent(task.flips) if task.lost is None else f"{percent(task.lost)}, {percent(task.gained or 0.0)}",
            number(task.dense.items),
        )
        for name, task in tasks.items()
    ]
    columns = ("task", "dense", "pruned", "change", "recovery", "per character", "same answer", "lost, gained", "items")
    note = (
        "Accuracy ± standard error. Lost: right → wrong; gained: wrong → right. In brackets 95 % intervals from those "
        "items, for both models answered the same ones. κ: Cohen's kappa, the same answer beyond chance."
    )
    return Table("Tasks", columns, tuple(rows), note)


def _latency(latency: LatencyFigures | None) -> Table | None:
    if latency is None:
        return None
    rows: list[Row] = []
    for work in latency.workloads.values():
        title = workload_title(work)
        rows.append((title, "dense", *_percentiles(work.dense), number(work.dense_tokens_per_s), ""))
        speed = (*_percentiles(work.compressed), number(work.compressed_tokens_per_s), speedup(work.speedup))
        rows.append((title, "pruned", *speed))
        if work.control:
            rows.append((title, "dense against itself (A/A)", "", "", "", "", ratio(work.control)))
    skipped = "".join(f" Skipped {name}: {reason}." for name, reason in latency.skipped.items())
    note = (
        f"ONNX, {latency.provider}, {latency.threads} threads, {latency.rounds} interleaved rounds or more. TTFT: time "
        "to first token; TPOT: time per output token. The speed-up is the median of the rounds' ratios; in brackets "
        "95 % intervals, from blocks of rounds, widened by what a second copy of the dense model measures against the "
        f"first, which is noise. **Bold** is a difference beyond it.{skipped}"
    )
    return Table("Latency", ("workload", "model", "p50", "p95", "p99", "tokens/s", "speed-up"), tuple(rows), note)


def workload_title(work: WorkloadFigures) -> str:
    """Return what a workload times, as the field calls it."""
    if work.past:
        return f"TPOT: decode step after {number(work.past)} tokens"
    return f"TTFT: prefill of {number(work.tokens)} tokens"


def ratio(found: Ratio) -> str:
    """Return a ratio of times with its interval: "1.06× (0.98–1.14)"."""
    return f"{found.value:.3g}× ({found.low:.3g}–{found.high:.3g})"


def speedup(found: Ratio) -> str:
    """Return a speed-up with its interval, in bold only if that does not contain 1."""
    value, _, interval = ratio(found).partition(" ")
    return f"{value} {interval}" if found.low <= 1 <= found.high else f"**{value}** {interval}"


def _percentiles(summary: Summary) -> Row:
    shown = ((summary.p50, summary.p50_interval), (summary.p95, summary.p95_interval), (summary.p99, None))
    return tuple(
        render_percentile(value, summary.n) + (f" ({ends[0]:.4g}–{ends[1]:.4g})" if ends else "")
        for value, ends in shown
    )


def _cold_start(latency: LatencyFigures | None) -> Table | None:
    if latency is None:
        return None
    names = {"dense": "dense", "compressed": "pruned"}
    rows = [
        (
            names[model],
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


def _ceiling(latency: LatencyFigures | None) -> Table | None:
    if latency is None or not latency.roofline:
        return None
    rows = [
        (
            name,
            size(line.bytes_per_step),
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


def _memory(memory: MemoryFigures | None) -> Table | None:
    if memory is None:
        return None
    models = {"dense": memory.dense, "pruned": memory.compressed}
    rows = [(name, size(peak.peak), size(peak.interpreter)) for name, peak in models.items()]
    note = f"{memory.dense.method}; ratio {number(memory.ratio)}."
    return Table("Memory", ("ONNX model", "peak", "of which libraries"), tuple(rows), note)


def _machine(results: Results) -> Table:
    machine = results.machine
    rows: list[Row] = [("processor", f"{machine.cpu}, {machine.cores} cores, {machine.platform}")]
    if machine.gpu:
        rows.append(("GPU", machine.gpu))
    rows.append(("memory", size(machine.memory_bytes)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())))
    for provider, operators in results.placement.items():
        rows.append((provider, ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))))
    return Table("Machine", ("", ""), tuple(rows))
