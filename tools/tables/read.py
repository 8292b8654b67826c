"""Committed results, and figures as the pages show them."""

from __future__ import annotations

import json
from math import floor, log10
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def read(path: str) -> Any:
    """Return a JSON file below benchmarks/."""
    return json.loads((BENCHMARKS / path).read_text(encoding="utf-8"))


def decimals(value: float) -> int:
    """Return how many decimals four significant digits have."""
    return max(0, 3 - floor(log10(abs(value)))) if value else 3


def four(value: float) -> str:
    """Return a figure with four significant digits."""
    return f"{value:.{decimals(value)}f}"


def megabytes(count: float, digits: int = 0) -> str:
    """Return bytes in decimal MB."""
    return f"{count / 1e6:.{digits}f}"
