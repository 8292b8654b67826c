"""Latency distributions of both models, relative to the dense one, beside what the machine's noise alone gives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soco_export.bench.figures import WorkloadFigures
from soco_export.bench.stats import Summary
from soco_export.report.draw.style import INK, MAIN, NOISE, SECOND
from soco_export.report.material import Material
from soco_export.report.rendering import noise_note
from soco_export.report.schema import Results


def draw(results: Results, material: Material, figure: Any) -> str:
    """Draw a box per workload and model: quartiles, 5 and 95 %, in units of the dense model's median."""
    works = dict(results.latency.workloads) if results.latency else {}
    works = {name: work for name, work in works.items() if work.dense.quantiles and work.compressed.quantiles}
    if not works:
        return ""
    figure.set_size_inches(6.4, 1.1 + 0.75 * len(works))
    axes = figure.subplots()
    for row, work in enumerate(works.values()):
        unit = work.dense.quantiles[2]
        _noise(axes, work, row)
        _boxes(axes, (work.dense, work.compressed), unit, row)
    axes.axvline(1.0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(works)), list(works))
    axes.invert_yaxis()
    axes.set_xlabel("time / median of the dense model (shorter is faster)")
    for colour, label in ((SECOND, "dense"), (MAIN, "this model"), (NOISE, "dense against itself")):
        axes.plot([], [], color=colour, linewidth=6, alpha=1.0 if colour != NOISE else 0.35, label=label)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.16 + 0.06 * (4 - min(4, len(works)))), ncols=3)
    said = ", ".join(
        f"{name} {work.speedup.value:.2f} × as fast{noise_note(work.speedup)}" for name, work in works.items()
    )
    return (
        "Boxes: quartiles and 5 to 95 % of all passes of each model. Grey: the 95 % interval that a copy of the dense "
        f"model shows against itself, which is noise. {said}."
    )


def _noise(axes: Any, work: WorkloadFigures, row: int) -> None:
    if work.control:
        low, high = 1 / work.control.high, 1 / work.control.low
        axes.barh(row, high - low, left=low, height=0.86, color=NOISE, alpha=0.35, linewidth=0)


def _boxes(axes: Any, summaries: Sequence[Summary], unit: float, row: int) -> None:
    names = ("whislo", "q1", "med", "q3", "whishi")
    for shift, colour, summary in zip((-0.19, 0.19), (SECOND, MAIN), summaries, strict=True):
        values = dict(zip(names, (value / unit for value in summary.quantiles), strict=True))
        line = {"color": INK, "linewidth": 0.9}
        axes.bxp(
            [{**values, "fliers": []}],
            positions=[row + shift],
            widths=0.28,
            orientation="horizontal",
            patch_artist=True,
            manage_ticks=False,
            showfliers=False,
            boxprops={"facecolor": colour, "edgecolor": INK, "linewidth": 0.9},
            medianprops=line,
            whiskerprops=line,
            capprops=line,
        )
