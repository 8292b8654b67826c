"""Series → Markdown, purely: ratios against dense, the floors they are held to, and the distance to the bandwidth.

decode floor    0.9 × (bytes a dense step reads / bytes a compressed step reads)
prefill floor   0.85 × (dense FLOPs / compressed FLOPs)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

DECODE, PREFILL = "decode_128", "prefill_512"
HEADER = "| model | MB | decode ms | speed-up | floor | | of bandwidth | prefill ms | speed-up | floor | |"
RULE = "|---|---|---|---|---|---|---|---|---|---|---|"


def floors(entry: Mapping[str, Any], dense: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return the least speed-up of decode and prefill that `entry` owes to its size, None if that is not known."""
    if not entry["bytes"] or not entry["flops"] or not dense["bytes"] or not dense["flops"]:
        return None
    return 0.9 * dense["bytes"] / entry["bytes"], 0.85 * dense["flops"] / entry["flops"]


def markdown(title: str, entries: Sequence[Mapping[str, Any]], bandwidth: float) -> str:
    """Return one series as a table; the first entry is what the others are compared with."""
    return "\n".join([f"### {title}\n", HEADER, RULE, *(_row(entry, entries[0], bandwidth) for entry in entries), ""])


def _row(entry: Mapping[str, Any], dense: Mapping[str, Any], bandwidth: float) -> str:
    owed = None if entry is dense else floors(entry, dense)
    cells = [entry["name"], f"{entry['disk'] / 1e6:.0f}" if entry["disk"] else ""]
    cells += _timed(entry, DECODE, owed and owed[0])
    reached = 1e5 * entry["bytes"] / bandwidth / entry["milliseconds"][DECODE] if entry["bytes"] else None
    cells.append("" if reached is None else f"{reached:.0f} %")
    cells += _timed(entry, PREFILL, owed and owed[1])
    return f"| {' | '.join(cells)} |"


def _timed(entry: Mapping[str, Any], work: str, floor: float | None) -> Iterator[str]:
    value, low, high = entry["speedups"][work]
    yield f"{entry['milliseconds'][work]:.1f}"
    yield f"{value:.2f} ({low:.2f} … {high:.2f})"
    yield "" if floor is None else f"{floor:.2f}"
    yield "" if floor is None else _verdict(value, high, floor)


def _verdict(value: float, high: float, floor: float) -> str:
    return "holds" if value >= floor else "within noise" if high >= floor else "**missed**"
