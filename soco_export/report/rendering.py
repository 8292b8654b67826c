"""Figures as text, and titled tables of them: what every rendering (Markdown, HTML, a terminal) shows."""

from __future__ import annotations

from dataclasses import dataclass

from soco_export.bench.stats import Ratio
from soco_export.files.text import ALL_DIGITS

Row = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A titled table; `note` says how the figures are to be read."""

    title: str
    columns: Row
    rows: tuple[Row, ...]
    note: str = ""


def number(value: float | int | None) -> str:
    """Return a figure for people: four significant digits, thousands set apart."""
    if value is None:
        return "n/a"
    if isinstance(value, int) or 10_000 <= abs(value) < ALL_DIGITS:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ratio_text(value: float, ends: tuple[float, float] | None, digits: int = 3) -> str:
    """Return a ratio with its interval: "1.045 × (1.031–1.060)"."""
    interval = f" ({ends[0]:.{digits}f}–{ends[1]:.{digits}f})" if ends else ""
    return f"{value:.{digits}f} ×{interval}"


def percent(share: float) -> str:
    """Return a share for people; only an exact 1 shows as 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.2f} %" if share < 1 else f"{100 * share:.2f} %"


def ratio(found: Ratio) -> str:
    """Return a ratio of times with its interval: "1.06× (0.98–1.14)"."""
    return f"{found.value:.3g}× ({found.low:.3g}–{found.high:.3g})"


def speedup(found: Ratio) -> str:
    """Return a speed-up with its interval, in bold only if that does not contain 1."""
    value, _, interval = ratio(found).partition(" ")
    return f"{value} {interval}" if found.within_noise else f"**{value}** {interval}"


def noise_note(found: Ratio) -> str:
    """Return " (within the noise)" for a ratio whose interval contains 1."""
    return " (within the noise)" if found.within_noise else ""


def with_ends(text: str, ends: tuple[float, float] | None) -> str:
    """Return a figure with its interval in brackets, if it has one."""
    return f"{text} ({number(ends[0])}{'–' if ends[0] >= 0 else ' to '}{number(ends[1])})" if ends else text
