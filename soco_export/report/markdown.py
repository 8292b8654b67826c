"""report.md: one page, the verdict first, then the tables, then the exact recipe."""

from __future__ import annotations

import yaml

from soco_export.files.text import fence, markdown
from soco_export.report.schema import Results
from soco_export.report.tables import Row, Table, all_tables, verdict_line


def render_markdown(results: Results) -> str:
    """Return report.md."""
    parts = [f"# {markdown(results.model.name)}: {verdict_line(results)}", _origin(results)]
    parts += [render_table(table) for table in all_tables(results)]
    recipe = render_recipe(results)
    parts.append(f"## Recipe\n\n{fence(recipe)}yaml\n{recipe}{fence(recipe)}")
    return "\n\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """Return one table with its title and note."""
    rule = tuple("---" for _ in table.columns)
    lines = [_row(table.columns), _row(rule), *(_row(row) for row in table.rows)]
    body = f"## {table.title}\n\n" + "\n".join(lines)
    return f"{body}\n\n{markdown(table.note)}" if table.note else body


def render_recipe(results: Results) -> str:
    """Return the recipe as YAML, ending in a newline."""
    return str(yaml.safe_dump(dict(results.recipe), sort_keys=False, allow_unicode=True))


def _row(cells: Row) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    """Return a cell as it is to be read; what is bold as a whole stays bold."""
    bold = text.startswith("**") and text.endswith("**") and len(text) > 4
    return f"**{markdown(text[2:-2])}**" if bold else markdown(text)


def _origin(results: Results) -> str:
    model = results.model
    revision = f" at {model.revision}" if model.revision else ""
    return markdown(f"{model.architecture} from {model.source}{revision}, written as {results.format}.")
