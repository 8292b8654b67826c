"""Text for a terminal, for Markdown and for one line, made harmless where others wrote it; and lines in columns."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ALL_DIGITS = 10**sys.float_info.dig  # below it a float has every digit of a whole number

# What moves a cursor, hides or reorders text, or cannot be encoded: C0 and C1 controls, the marks that change the
# direction of writing (Unicode annex 9), characters without width, line and paragraph separators, half surrogate pairs.
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]"
)
# An underscore inside a word is no markup (CommonMark 6.2), and names of gates and layers stay legible.
MARKUP = re.compile(r"([\\`*\[\]<>|~$&]|(?<!\w)_|_(?!\w))")
_COLUMNS = 80  # of a terminal as it is opened
_SHOWN = 2000  # characters of one value: a name of a million would bury what matters


def visible(text: str) -> str:
    r"""Return `text` with what a terminal would obey instead of showing as \x1b or \u202e; lines and tabs stay."""
    return UNSEEN.sub(lambda found: found[0].encode("unicode_escape", "surrogatepass").decode(), text)


def one_line(text: str) -> str:
    r"""Return `text` in one line of bounded length, so that a value cannot look like a line of ours."""
    shown = visible(text.replace("\n", "\\n").replace("\t", "\\t"))
    return shown if len(shown) <= _SHOWN else f"{shown[:_SHOWN]}…"


def as_yaml(values: Mapping[str, Any], dumper: Any, **options: Any) -> str:
    """Return `values` as YAML in their order; where one holds what a terminal would obey, in ASCII with escapes."""
    import yaml

    def written(readable: bool) -> str:
        return str(yaml.dump(dict(values), Dumper=dumper, sort_keys=False, allow_unicode=readable, **options))

    text = written(readable=True)
    return written(readable=False) if UNSEEN.search(text) else text


def folded(line: str, width: int = _COLUMNS) -> str:
    """Return a line of figures in lines of at most `width` columns, broken where one ends: a name or path stays whole.

    What follows the first line is indented.
    """
    pieces = re.split(r"(?<= · )|(?<=, )|(?<=[:.] )|(?<= → )", line)
    lines = [""]
    for piece in pieces:
        if lines[-1].strip() and len((lines[-1] + piece).rstrip()) > width:
            lines.append("  ")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def fence(text: str) -> str:
    """Return a code fence longer than any run of backticks in `text`."""
    return "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])


def markdown(text: str) -> str:
    """Return `text` as Markdown that shows it word for word."""
    return MARKUP.sub(r"\\\1", one_line(text))


def aligned(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns: the first to the left, the others to the right."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return ["  ".join((line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:]))).rstrip() for line in lines]


def exact(value: float) -> str:
    """Return a figure to hold against another: six significant digits, whole numbers of more with all of them."""
    return f"{value:,.0f}" if 1e6 <= abs(value) < ALL_DIGITS else f"{value:.6g}"


def human_bytes(number: float) -> str:
    """Return bytes in decimal units, as disks and GPUs are sold: "538.1 MB"; "–" for none."""
    value, units = float(number), ["B", "kB", "MB", "GB", "TB"]
    while round(value, 1) >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    digits = 0 if units[0] == "B" else 1
    return f"{value:.{digits}f} {units[0]}" if number else "–"
