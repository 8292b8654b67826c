"""report.md: one page, the verdict first, then the tables, then the exact recipe."""

from __future__ import annotations

import yaml

from soco_export.report.schema import Results
from soco_export.report.tables import Row, Table, all_tables, verdict_line


def render_markdown(results: Results) -> str:
    """Return report.md."""
    parts = [f"# {results.model.name}: {verdict_line(results)}", _origin(results)]
    parts += [render_table(table) for table in all_tables(results)]
    parts.append("## Recipe\n\n```yaml\n" + render_recipe(results) + "```")
    return "\n\n".join(parts) + "\n"


def render_table(table: Table) -> str:
    """Return one table with its title and note."""
    rule = tuple("---" for _ in table.columns)
    lines = [_row(table.columns), _row(rule), *(_row(row) for row in table.rows)]
    body = f"## {table.title}\n\n" + "\n".join(lines)
    return f"{body}\n\n{table.note}" if table.note else body


def render_recipe(results: Results) -> str:
    """Return the recipe as YAML, ending in a newline."""
    return str(yaml.safe_dump(dict(results.recipe), sort_keys=False, allow_unicode=True))


def _row(cells: Row) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _origin(results: Results) -> str:
    model = results.model
    revision = f" at {model.revision}" if model.revision else ""
    return f"{model.architecture} from {model.source}{revision}, written as {results.format}."
