"""The documentation's tables of measurements, made from the committed JSON: `python -m tools.tables` writes them.

A table stands under a comment with its name; its text is what the function of that name returns:

    <!-- table: packing -->
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tools.tables import bits, quality, speed

ROOT = Path(__file__).parents[2]
Rows = Sequence[Sequence[str]]
TABLES: dict[str, Callable[[], Rows]] = {**bits.TABLES, **quality.TABLES, **speed.TABLES}
MARKER = re.compile(r"<!-- table: (\S+) -->\n((?:\|.*\n)*)")


def render(rows: Rows) -> str:
    """Return rows of cells as Markdown, the first as header."""
    head, *rest = rows
    lines = [f"| {' | '.join(row)} |\n".replace("  |", " |") for row in (head, *rest)]
    return "".join([lines[0], f"|{'---|' * len(head)}\n", *lines[1:]])


def tables(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name of each table of a page and what stands under it."""
    yield from MARKER.findall(text)


def written(text: str) -> str:
    """Return a page with all of its tables made anew."""
    return MARKER.sub(lambda found: f"<!-- table: {found[1]} -->\n{render(TABLES[found[1]]())}", text)
