"""Which point of a sweep ships: the best of those that meet every limit, with the reason each other was left. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from soco_export.files.text import exact
from soco_export.report.material import FrontierPoint

Preference = Literal["quality", "bytes", "speed"]


@dataclass(frozen=True)
class Bound:
    """A figure of a point and the end that it must not pass. `at_most`: an upper end, else a lower one."""

    name: str
    figure: str
    value: float
    at_most: bool = True

    def excess(self, point: FrontierPoint) -> float:
        """Return by what share the figure passes the end: ≤ 0 where it meets it, infinite where it was not measured."""
        found = getattr(point, self.figure)
        if found is None or math.isnan(found):
            return math.inf
        over = found - self.value if self.at_most else self.value - found
        return float(over / self.value) if self.value else float(over)

    def reason(self, point: FrontierPoint) -> str:
        """Return why it rejects the point."""
        found = getattr(point, self.figure)
        if found is None:
            return f"{self.name}: {self.figure} was not measured"
        side = "above" if self.at_most else "below"
        return f"{self.name}: {self.figure} is {exact(found)}, {side} {exact(self.value)}"


@dataclass(frozen=True)
class Pick:
    """`chosen`: the best point that every limit lets pass; `rejected`: name → reasons; `nearest`: the least miss.

    `nearest` is None where a point was chosen, or where each has a figure that was not measured.
    """

    chosen: FrontierPoint | None
    rejected: Mapping[str, tuple[str, ...]]
    nearest: FrontierPoint | None = None


def _quality(point: FrontierPoint) -> float:
    return _known(point.perplexity_ratio)


def _bytes(point: FrontierPoint) -> float:
    return float(point.bytes)


def _speed(point: FrontierPoint) -> float:
    return _known(point.decode_ms)


def _known(figure: float | None) -> float:
    """Return a figure, worse than all others where it was not measured, or is NaN: nothing is below NaN."""
    return math.inf if figure is None or math.isnan(figure) else figure


# what decides, then what decides among equals
ORDERS: Mapping[Preference, tuple[Callable[[FrontierPoint], float], ...]] = {
    "quality": (_quality, _bytes, _speed),
    "bytes": (_bytes, _quality, _speed),
    "speed": (_speed, _quality, _bytes),
}


def choose(points: Sequence[FrontierPoint], limits: Sequence[Bound], prefer: Preference = "quality") -> Pick:
    """Return the best point that passes no limit and failed no gate of its own; an unmeasured figure meets no limit."""
    rejected = {point.name: reasons for point in points if (reasons := _reasons(point, limits))}
    fits = [point for point in points if point.name not in rejected]
    if fits:
        return Pick(min(fits, key=lambda point: _key(point, prefer)), rejected)
    near = [point for point in points if point.gates != "failed" and math.isfinite(_miss(point, limits))]
    return Pick(None, rejected, min(near, key=lambda p: (_miss(p, limits), _key(p, prefer)), default=None))


def _reasons(point: FrontierPoint, limits: Sequence[Bound]) -> tuple[str, ...]:
    own = ("its own gates failed",) if point.gates == "failed" else ()
    return (*own, *(limit.reason(point) for limit in limits if limit.excess(point) > 0))


def _miss(point: FrontierPoint, limits: Sequence[Bound]) -> float:
    return max((limit.excess(point) for limit in limits), default=0.0)


def _key(point: FrontierPoint, prefer: Preference) -> tuple[float | str, ...]:
    return (*(figure(point) for figure in ORDERS[prefer]), point.name)
