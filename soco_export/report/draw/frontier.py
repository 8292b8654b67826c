"""The frontier of a sweep: quality against size, the point that ships marked."""

from __future__ import annotations

from typing import Any

from soco_export.report.draw.style import INK, MAIN, SECOND
from soco_export.report.material import Material
from soco_export.report.schema import Results


def draw(results: Results, material: Material, figure: Any) -> str:
    """Draw a point per size; no picture for fewer than two."""
    measured = [point for point in material.frontier if point.perplexity_ratio is not None]
    points = sorted(measured, key=lambda point: point.bytes_ratio)
    if len(points) < 2:
        return ""
    axes = figure.subplots()
    for weights in dict.fromkeys(point.weights for point in points):
        line = [(p.bytes_ratio, p.perplexity_ratio) for p in points if p.weights == weights]
        axes.plot(*zip(*line, strict=True), "o-", color=MAIN)
    for point in points:
        at = (point.bytes_ratio, point.perplexity_ratio)
        if point.chosen:
            axes.plot(*at, "o", color=SECOND, markersize=10, zorder=3)
        axes.annotate(point.name, at, (4, 6), textcoords="offset points", color=INK, fontsize=9)
    axes.axhline(1.0, color=INK, linewidth=0.8, linestyle="--")
    axes.set_xlabel("bytes / dense")
    axes.set_ylabel("perplexity / dense")
    axes.margins(0.12)
    chosen = "".join(f"; {point.name} is the one that ships" for point in points if point.chosen)
    return f"Perplexity against bytes, both beside the dense model, at {len(points)} sizes{chosen}."
