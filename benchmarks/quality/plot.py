"""Perplexity against stored parameters: a line per method, whiskers from the least to the greatest seed.

    python -m benchmarks.quality.plot benchmarks/quality/results/tiny

writes perplexity-TEXT.svg beside the results.json of each folder; needs matplotlib (the extra `report`).
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quality.cells import CellResult, Perplexity
from benchmarks.quality.table import Row, rows


def main(folders: Sequence[str]) -> None:
    """Draw what the results in each folder show, a plot for each text."""
    for folder in map(Path, folders):
        document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
        dense = {text: Perplexity(**figures) for text, figures in document["dense"].items()}
        table = rows([CellResult.read(found) for found in document["cells"]], dense)
        for text, figures in dense.items():
            path = folder / f"perplexity-{text}.svg"
            path.write_text(draw(table, text, figures), encoding="utf-8")
            print(path)


def draw(table: Sequence[Row], text: str, dense: Perplexity) -> str:
    """Return the plot of one text as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(row.method for row in table):
        _line(axes, method, sorted((row for row in table if row.method == method), key=lambda row: row.stored), text)
    axes.axhline(dense.value, color="black", linewidth=0.8, linestyle="--", label="dense")
    axes.set_yscale("log")
    axes.set_xlabel("stored parameters of the pruned layers (millions)")
    axes.set_ylabel(f"perplexity ({text})")
    figure.legend(loc="outside right upper", fontsize="small")
    out = io.StringIO()
    # A fixed salt and no date: the same results give the same file.
    with rc_context({"svg.hashsalt": "soco-export", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()


def _line(axes: Any, method: str, points: Sequence[Row], text: str) -> None:
    found = [point.texts[text] for point in points]
    below = [figures.mean - min(figures.values) for figures in found]
    above = [max(figures.values) - figures.mean for figures in found]
    stored = [point.stored / 1e6 for point in points]
    axes.errorbar(stored, [f.mean for f in found], yerr=[below, above], marker=".", capsize=2, label=method)


if __name__ == "__main__":
    main(sys.argv[1:])
