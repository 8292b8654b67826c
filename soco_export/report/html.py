"""report.html: the same tables and the plots, in one file that needs nothing else, not even a network."""

from __future__ import annotations

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from soco_export.files.text import visible
from soco_export.report.markdown import render_recipe
from soco_export.report.plots import draw_plots
from soco_export.report.schema import Results
from soco_export.report.tables import all_tables, verdict_line

TEMPLATE = "report.html.jinja"
BOLD = re.compile(r"\*\*(.+?)\*\*")


def render_html(results: Results) -> str:
    """Return report.html."""
    plots, absence = draw_plots(results)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
    )
    environment.filters["pieces"] = _pieces
    text: str = environment.get_template(TEMPLATE).render(
        results=results,
        verdict=verdict_line(results),
        state="none" if not results.verdicts else "passed" if results.passed else "failed",
        tables=all_tables(results),
        plots=plots,
        absence=absence,
        recipe=render_recipe(results),
    )
    return text


def _pieces(cell: str) -> list[tuple[bool, str]]:
    """Take a cell apart at its **bold** parts: (is bold, text) in order; escaping is the template's."""
    return [(index % 2 == 1, text) for index, text in enumerate(BOLD.split(cell)) if text]
