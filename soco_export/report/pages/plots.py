"""Plots of a run as inline SVG; without matplotlib (extra `report`) the report says so and goes on.

Lines and text take the colour of the page's text, so that one picture serves light and dark; each has a title and a
description for those who do not see it, ids of its own, and scales with the page.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape
from typing import Any

from soco_export.files.text import visible
from soco_export.report.draw import curves, forgetting, frontier, latency, ranks
from soco_export.report.draw.style import INK, STYLE
from soco_export.report.material import Material
from soco_export.report.schema import Results

ABSENT = "No plots: matplotlib is not installed (pip install matplotlib)."
NO_PLOT = Material()
NOTHING = "No plots: nothing that can be drawn was measured."
IDS = re.compile(r'(?<=[ (])((?:xlink:)?href="#|id="|url\(#)')
SIZE = re.compile(r'<svg[^>]*? viewBox="([^"]+)"[^>]*>')


@dataclass(frozen=True)
class Plot:
    """`svg`: an <svg> element that stands alone; `text`: what it shows, in a sentence."""

    title: str
    text: str
    svg: str


@dataclass(frozen=True)
class Picture:
    """`draw(results, material, figure)` draws into a matplotlib figure, and returns what it shows ("": nothing)."""

    title: str
    draw: Callable[[Results, Material, Any], str]


PICTURES = (
    Picture("Ranks that were kept", ranks.draw),
    Picture("Learning the scores", curves.draw_scores),
    Picture("Distilling the factors", curves.draw_distillation),
    Picture("Where the loss grew", forgetting.draw),
    Picture("Time beside the dense model", latency.draw),
    Picture("Size against quality", frontier.draw),
)


def draw_plots(results: Results, material: Material = NO_PLOT) -> tuple[list[Plot], str]:
    """Return the plots, and why there are none ("" if there are)."""
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError:
        return [], ABSENT
    plots: list[Plot] = []
    with rc_context(STYLE):
        for picture in PICTURES:
            figure = Figure(figsize=(6.4, 3.2), layout="constrained")
            text = picture.draw(results, material, figure)
            if text:
                plots.append(_plot(picture.title, text, figure, f"plot{len(plots) + 1}"))
    return plots, "" if plots else NOTHING


def _plot(title: str, text: str, figure: Any, name: str) -> Plot:
    """Return the figure with ids that begin with `name`, in the colours of the page, as wide as its place."""
    raw = svg(figure)
    raw = IDS.sub(lambda found: f"{found[1]}{name}-", raw).replace(INK, "currentColor")
    labels = f'<title id="{name}-title">{escape(visible(title))}</title>'
    labels += f'<desc id="{name}-desc">{escape(visible(text))}</desc>'
    head = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" role="img" '
    head += f'aria-labelledby="{name}-title {name}-desc" width="100%" viewBox="'
    return Plot(title, text, SIZE.sub(lambda found: f'{head}{found[1]}">{labels}', raw, count=1))


def svg(figure: Any) -> str:
    """Return a matplotlib figure as an <svg> element; the same figure gives the same text."""
    from matplotlib import rc_context

    text = io.StringIO()
    # A fixed salt and no date: the same results give the same file.
    with rc_context({"svg.hashsalt": "soco-export", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    found = text.getvalue()[text.getvalue().index("<svg") :]
    return re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
