"""Results → tables of text, once for every rendering: Markdown, HTML and the console show the same rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from soco_export.evaluate.figures import ParityFigures, PerplexityFigures, TaskComparison
from soco_export.evaluate.paired import perplexity_ratio
from soco_export.files.text import human_bytes
from soco_export.report.material import Material
from soco_export.report.pages.forgetting import domains_table, kinds_table, predictions_table
from soco_export.report.pages.speed_tables import ceiling_table, cold_start_table, latency_table, memory_table
from soco_export.report.rendering import Row, Table, noise_note, number, percent, with_ends
from soco_export.report.schema import ParityResults, PerplexityResults, Results, SizeFigures


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
                with_ends(f"{found.ratio:.3f} ×", found.ratio_interval),
            )
        )
    for name, task in results.tasks.items():
        kept = "n/a" if task.recovery is None else f"{task.recovery:.3f} ×"
        rows.append((f"{name}, accuracy", percent(task.dense.acc), percent(task.compressed.acc), kept))
    for work in (results.latency.workloads if results.latency else {}).values():
        kind = f"decode after {number(work.past)} tokens" if work.past else f"prefill of {number(work.tokens)} tokens"
        speeds = (f"{number(work.dense_tokens_per_s)} tok/s", f"{number(work.compressed_tokens_per_s)} tok/s")
        rows.append((kind, *speeds, f"{work.speedup.value:.2f} ×{noise_note(work.speedup)}"))
    if results.memory:
        peaks = human_bytes(results.memory.dense.peak), human_bytes(results.memory.compressed.peak)
        rows.append(("peak memory", *peaks, f"{results.memory.ratio:.3f} ×"))
    note = "Speeds: within the noise where the 95 % interval of the ratio contains 1." if results.latency else ""
    return Table("What changed", ("", "dense", "this model", "ratio"), tuple(rows), note)


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


def all_tables(results: Results) -> list[Table]:
    """Return every table of details that has something to show; verdicts and what changed come before them."""
    tables = [
        _sizes(results.sizes),
        _perplexity(results.perplexity),
        _parity(results.parity),
        _tasks(results.tasks),
        kinds_table(results.forgetting),
        domains_table(results.forgetting),
        predictions_table(results.forgetting),
        latency_table(results.latency),
        cold_start_table(results.latency),
        ceiling_table(results.latency),
        memory_table(results.memory),
        _machine(results),
    ]
    return [table for table in tables if table is not None and table.rows]


def _sizes(sizes: SizeFigures) -> Table:
    rows = [
        _before_after("parameters, all", sizes.params_before, sizes.params_after),
        _before_after("parameters, selected layers", sizes.selected_before, sizes.selected_after),
        *_bytes_rows(sizes.bytes),
        *_cache_rows(sizes),
    ]
    left = f"{sizes.layers_dense} of {sizes.layers} selected layers left dense"
    largest = sizes.largest_coefficient
    pivots = "" if largest is None else f" Pivots combine with coefficients of at most {largest:.3g}."
    asked = f"keep_params {sizes.keep_params:g}, stored {sizes.storage}"
    if sizes.keep_bytes is not None:
        written = "" if sizes.file_bytes is None else f" (model.onnx and its data: {sizes.file_bytes:,})"
        asked = f"keep_bytes {sizes.keep_bytes:,}{written}"
    note = f"asked: {asked}; {left}.{pivots}"
    return Table("Size", ("", "dense", "this model", "ratio"), tuple(rows), note)


def _before_after(name: str, before: int, after: int) -> Row:
    return name, number(before), number(after), f"{after / before:.3f} ×" if before else "n/a"


def _bytes_rows(folders: Mapping[str, int]) -> Iterator[Row]:
    """Yield a row per form: a folder NAME-dense is the dense model in the form of the folder NAME."""
    for name, count in folders.items():
        if f"{name}-dense" in folders:
            yield _bytes_row(f"on disk: {name}", folders[f"{name}-dense"], count)
        elif not name.endswith("-dense"):
            yield f"on disk: {name}", "", human_bytes(count), ""


def _cache_rows(sizes: SizeFigures) -> Iterator[Row]:
    if sizes.cache_bytes:
        yield _bytes_row("cache, a token", sizes.cache_bytes["onnx-dense"], sizes.cache_bytes["onnx"])


def _bytes_row(name: str, before: int, after: int) -> Row:
    return name, human_bytes(before), human_bytes(after), f"{after / before:.3f} ×" if before else "n/a"


def _perplexity(perplexity: PerplexityResults | None) -> Table | None:
    if perplexity is None:
        return None
    forms = {"dense": perplexity.dense, "low-rank": perplexity.low_rank, "ONNX": perplexity.onnx}
    rows = [
        (
            name,
            with_ends(number(form.value), form.interval),
            _beside(perplexity.dense, form),
            number(form.loss),
            number(form.tokens),
        )
        for name, form in forms.items()
        if form is not None
    ]
    return Table("Perplexity", ("", "perplexity", "/ dense", "loss (nats)", "tokens"), tuple(rows), _text(perplexity))


def _beside(dense: PerplexityFigures, form: PerplexityFigures) -> str:
    ratio, ends = perplexity_ratio(dense, form)
    return with_ends(number(ratio), ends) if form is not dense else "1"


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
            with_ends(number(task.difference), task.difference_interval),
            with_ends(number(task.recovery), task.recovery_interval),
            f"{number(task.dense.acc_norm)} → {number(task.compressed.acc_norm)}",
            percent(task.agreement) + (f" (κ {task.kappa:.2f})" if task.kappa is not None else ""),
            percent(task.flips) if task.lost is None else f"{percent(task.lost)}, {percent(task.gained or 0.0)}",
            number(task.dense.items),
        )
        for name, task in tasks.items()
    ]
    columns = (
        "task",
        "dense",
        "this model",
        "change",
        "recovery",
        "per character",
        "same answer",
        "lost, gained",
        "items",
    )
    note = (
        "Accuracy ± standard error. Lost: right → wrong; gained: wrong → right. In brackets 95 % intervals from those "
        "items, for both models answered the same ones. κ: Cohen's kappa, the same answer beyond chance."
    )
    return Table("Tasks", columns, tuple(rows), note)


def _machine(results: Results) -> Table:
    machine = results.machine
    rows: list[Row] = [("processor", f"{machine.cpu}, {machine.cores} cores, {machine.platform}")]
    if machine.gpu:
        rows.append(("GPU", machine.gpu))
    rows.append(("memory", human_bytes(machine.memory_bytes)))
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())))
    for provider, operators in results.placement.items():
        rows.append((provider, ", ".join(f"{count} {name}" for name, count in sorted(operators.items()))))
    return Table("Machine", ("", ""), tuple(rows))
