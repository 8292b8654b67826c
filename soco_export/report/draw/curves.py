"""Training curves: what the loops reported of each step, with the phases of the training behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from soco_export.report.draw.style import INK, MAIN, NOISE, SECOND
from soco_export.report.material import Material
from soco_export.report.schema import Results

Rows = Sequence[Mapping[str, Any]]
LOSSES = {"kl": "KL to dense (nats)", "loss": "loss (nats)"}


def draw_scores(results: Results, material: Material, figure: Any) -> str:
    """Draw loss and size over the steps in which the scores were learnt."""
    rows = [row for row in material.curves if row["stage"] == "train"]
    loss = next((name for name in LOSSES if any(name in row for row in rows)), None)
    if loss is None or len(rows) < 2:
        return ""
    figure.set_size_inches(6.4, 3.6)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    _line(above, rows, loss, MAIN, LOSSES[loss])
    above.set_ylabel(LOSSES[loss])
    _line(below, rows, "soft", SECOND, "soft size")
    _line(below, rows, "hard", MAIN, "size of the support")
    below.axhline(results.sizes.keep_params, color=NOISE, linewidth=0.9, linestyle="--", label="asked")
    below.set_ylabel("size")
    below.set_xlabel("step")
    below.legend(loc="upper right", ncols=3, borderaxespad=0)
    below.margins(y=0.25)
    phases = _phases(rows, (above, below))
    first, last = _ends(rows, loss)
    return (
        f"{LOSSES[loss]} over {rows[-1]['step']} steps, {first:.3g} at first and {last:.3g} at last{phases}; "
        f"below, the size on its way to {results.sizes.keep_params:g}."
    )


def draw_distillation(results: Results, material: Material, figure: Any) -> str:
    """Draw the loss over the steps in which the factors were distilled, with the looks at held-out blocks."""
    rows = [row for row in material.curves if row["stage"] == "distill"]
    if sum("kl" in row for row in rows) < 2:
        return ""
    axes = figure.subplots()
    _line(axes, rows, "kl", MAIN, "KL to dense, each batch")
    looks = [row for row in rows if "held-out loss" in row]
    if looks:
        points = [row["step"] for row in looks], [row["held-out loss"] for row in looks]
        axes.plot(*points, "o-", color=SECOND, markersize=4, label="held-out blocks")
        axes.legend()
    axes.set_ylabel("nats")
    axes.set_xlabel("step")
    first, last = _ends(rows, "kl")
    seen = f", with {len(looks)} looks at held-out blocks" if looks else ""
    return f"KL to the dense model over {rows[-1]['step']} steps, {first:.3g} at first and {last:.3g} at last{seen}."


def _line(axes: Any, rows: Rows, name: str, colour: str, label: str) -> None:
    points = [(row["step"], row[name]) for row in rows if name in row]
    if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=label)


def _ends(rows: Rows, name: str) -> tuple[float, float]:
    """Return the means of the first and of the last tenth: single batches differ."""
    values = [row[name] for row in rows if name in row]
    tenth = max(1, len(values) // 10)
    return sum(values[:tenth]) / tenth, sum(values[-tenth:]) / tenth


def _phases(rows: Rows, axes: Sequence[Any]) -> str:
    """Shade every other phase and write its number; return how many there were, for the sentence."""
    spans = [(phase, list(steps)) for phase, steps in groupby(rows, key=lambda row: row.get("phase"))]
    if len(spans) < 2:
        return ""
    for index, (phase, steps) in enumerate(spans):
        begin, end = steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5
        for each in axes:
            if index % 2:
                each.axvspan(begin, end, color=NOISE, alpha=0.12, linewidth=0)
        axes[0].text(
            (begin + end) / 2, 1.0, f"phase {phase}", color=INK, fontsize=9, ha="center", va="bottom",
            transform=axes[0].get_xaxis_transform(),
        )  # fmt: skip
    return f" in {len(spans)} phases"
