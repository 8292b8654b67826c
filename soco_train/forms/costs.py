"""What a rank costs in each storage form that a plan may choose: arithmetic, known without torch and its modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

RankCost = Callable[[Any, Any, Any], Any]  # what `LayerFactors.cost` is


def stacked_cost(rank: Any, m: Any, n: Any) -> Any:
    """Return r(m + n); from r = mn/(m + n) on that is no less than dense."""
    return rank * (m + n)


def pivoted_cost(rank: Any, m: Any, n: Any) -> Any:
    """Return r(m + n - r), which is m n at r = min(m, n)."""
    return rank * (m + n - rank)


COSTS: dict[str, RankCost] = {"stacked": stacked_cost, "pivoted": pivoted_cost}  # a registered form adds its own
