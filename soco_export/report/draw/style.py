"""Colours and sizes of all pictures: legible on white and on black, and at the width of a telephone."""

from __future__ import annotations

from typing import Any

INK = "#010203"  # stands for the page's text colour, and is put in its place
MAIN, SECOND = "#3f8fd9", "#e08a2e"
NOISE = "#888888"
STYLE: dict[str, Any] = {
    "font.size": 11.0,
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Arial", "DejaVu Sans"],
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
}
