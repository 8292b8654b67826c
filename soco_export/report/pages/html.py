"""report.html: the verdict, what changed, the gates, then pictures and tables, in one file that needs no network."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from soco_export.files.text import visible
from soco_export.report.frontier import frontier_table
from soco_export.report.material import Material
from soco_export.report.pages.markdown import render_recipe
from soco_export.report.pages.plots import NO_PLOT, draw_plots
from soco_export.report.pages.tables import all_tables, changed, run_table
from soco_export.report.schema import Results
from soco_export.report.sentences import figures_sentence, origin, verdict_line
from soco_export.report.words import SIGNS, verdict_words

_TEMPLATE = "report.html.jinja"
BOLD = re.compile(r"\*\*(.+?)\*\*")


def render_html(results: Results, material: Material = NO_PLOT) -> str:
    """Return report.html."""
    plots, absence = draw_plots(results, material)
    frontier = frontier_table(material.frontier)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["pieces"] = _pieces
    text: str = environment.get_template(_TEMPLATE).render(
        results=results,
        verdict=verdict_line(results),
        sentence=figures_sentence(results),
        state="none" if not results.verdicts else "passed" if results.passed else "failed",
        gates=[(verdict.state, SIGNS[verdict.state], verdict_words(verdict)) for verdict in results.verdicts],
        origin=origin(results),
        changed=changed(results),
        tables=[*([frontier] if frontier else ()), *all_tables(results), run_table(results, material)],
        samples=material.samples,
        plots=plots,
        absence=absence,
        recipe=render_recipe(results),
    )
    return text


def _pieces(cell: str) -> list[tuple[bool, str]]:
    """Take a cell apart at its **bold** parts: (is bold, text) in order; escaping is the template's."""
    return [(index % 2 == 1, text) for index, text in enumerate(BOLD.split(cell)) if text]
