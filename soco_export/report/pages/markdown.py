"""report.md and comment.md: verdict, what changed and gates on the first screen; figures and recipe folded away."""

from __future__ import annotations

from collections.abc import Iterator

import yaml

from soco_export.files.text import as_yaml, fence, markdown
from soco_export.report.frontier import frontier_table
from soco_export.report.material import Material
from soco_export.report.pages.tables import all_tables, changed, run_table
from soco_export.report.rendering import Row, Table
from soco_export.report.schema import Results
from soco_export.report.sentences import figures_sentence, origin, verdict_line
from soco_export.report.words import SIGNS, verdict_words


def render_markdown(results: Results, material: Material | None = None) -> str:
    """Return report.md, as GitHub shows it in a job's summary."""
    shown = material or Material()
    details = [render_table(table) for table in (*all_tables(results), run_table(results, shown))]
    frontier = frontier_table(shown.frontier)
    recipe = render_recipe(results)
    parts = [
        *_first_screen(results),
        *(f"> {markdown(note)}" for note in results.notes),
        *([render_table(frontier)] if frontier else []),
        _folded("All figures", "\n\n".join(details)),
        _folded("Recipe, every setting resolved", f"{fence(recipe)}yaml\n{recipe}{fence(recipe)}"),
    ]
    return "\n\n".join(parts) + "\n"


def render_comment(results: Results) -> str:
    """Return comment.md, the body of a comment on a pull request: the first screen of report.md."""
    return "\n\n".join([*_first_screen(results), *(f"> {markdown(note)}" for note in results.notes)]) + "\n"


def render_table(table: Table) -> str:
    """Return one table with its title and note."""
    rule = tuple("---" for _ in table.columns)
    lines = [_row(table.columns), _row(rule), *(_row(row) for row in table.rows)]
    body = f"### {table.title}\n\n" + "\n".join(lines)
    return f"{body}\n\n{markdown(table.note)}" if table.note else body


def render_recipe(results: Results) -> str:
    """Return the recipe as YAML, ending in a newline."""
    return as_yaml(results.recipe, yaml.SafeDumper)


def _first_screen(results: Results) -> Iterator[str]:
    yield f"## {markdown(results.model.name)}: {verdict_line(results)}"
    sentence = figures_sentence(results)
    if sentence:
        yield markdown(sentence)
    yield render_table(changed(results))
    if results.verdicts:
        gates = [f"- {SIGNS[verdict.state]} {markdown(verdict_words(verdict))}" for verdict in results.verdicts]
        yield "\n".join(["### Gates\n", *gates])
    yield markdown(origin(results))


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _row(cells: Row) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Return a cell as it is to be read; what is bold at its beginning stays bold."""
    bold, _, rest = text[2:].partition("**") if text.startswith("**") else ("", "", text)
    return f"**{markdown(bold)}**{markdown(rest)}" if bold else markdown(text)
