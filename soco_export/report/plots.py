"""Plots of the results as inline SVG; without matplotlib (extra `report`) the report says so and goes on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from soco_export.report.schema import Results

ABSENT = "No plots: matplotlib is not installed (pip install matplotlib)."
NOTHING = "No plots: nothing that can be drawn was measured."


@dataclass(frozen=True)
class Plot:
    """`svg`: an <svg> element that stands alone."""

    title: str
    svg: str


def draw_plots(results: Results) -> tuple[list[Plot], str]:
    """Return the plots, and why there are none ("" if there are)."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return [], ABSENT
    plots = []
    for title, draw in PLOTS.items():
        figure = Figure(figsize=(5.2, 2.8), layout="constrained")
        axes = figure.subplots()
        if draw(results, axes):
            axes.invert_yaxis()  # bars from top to bottom in the tables' order
            plots.append(Plot(title, svg(figure)))
    return plots, "" if plots else NOTHING


def svg(figure: Any) -> str:
    """Return a matplotlib figure as an <svg> element; the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    # A fixed salt and no date: the same results give the same file.
    with rc_context({"svg.hashsalt": "soco-export", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _speedups(results: Results, axes: Any) -> bool:
    """Bars of speed-up with their intervals; the line at 1 is the dense model."""
    works = dict(results.latency.workloads) if results.latency else {}
    ratios = [work.speedup for work in works.values()]
    spread = [[r.value - r.low for r in ratios], [r.high - r.value for r in ratios]]
    if ratios:
        axes.barh(list(works), [r.value for r in ratios], xerr=[[max(e, 0.0) for e in side] for side in spread])
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("dense time / pruned time")
    return bool(ratios)


def _divergences(results: Results, axes: Any) -> bool:
    """Mean KL of each step on a logarithmic axis: what pruning cost against what the export cost."""
    steps = {"compression": results.parity.compression, "export": results.parity.export}
    bars = {
        f"{name}, {part}": kl
        for name, step in steps.items()
        if step is not None
        for part, kl in (("prefill", step.prefill.mean_kl), ("decode", step.decode.mean_kl))
        if kl > 0 and math.isfinite(kl)
    }
    if bars:
        axes.barh(list(bars), list(bars.values()))
        axes.set_xscale("log")
        axes.set_xlabel("mean KL (nats)")
    return bool(bars)


def _perplexities(results: Results, axes: Any) -> bool:
    """Perplexity of each form."""
    found = results.perplexity
    if found is None:
        return False
    forms = {"dense": found.dense, "low-rank": found.low_rank, "ONNX": found.onnx}
    bars = {name: form.value for name, form in forms.items() if form is not None}
    axes.barh(list(bars), list(bars.values()))
    axes.set_xlabel("perplexity")
    return True


PLOTS: dict[str, Callable[[Results, Any], bool]] = {
    "Speed-up over the dense ONNX model, with 95 % intervals": _speedups,
    "What each step costs": _divergences,
    "Perplexity on the same blocks": _perplexities,
}
