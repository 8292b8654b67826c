"""The frontier of a sweep: size, quality and speed of each point that one training gave, as data, file and table.

A point is an ordinary run, or the dense model in one type of weights, of which only what a run measured beside its own
model is known.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from soco_export.bench.figures import LatencyFigures, WorkloadFigures
from soco_export.files.text import human_bytes
from soco_export.report.material import OWN, FrontierPoint, Judgement
from soco_export.report.rendering import Table, ratio_text
from soco_export.report.schema import Results
from soco_train.bounded import read_text
from soco_train.errors import DataError
from soco_train.settings.section import MOST_NUMBER

SWEEP_VERSION: Literal[1] = 1
AGAIN = "move it away: soco-export sweep RUN makes it anew"
_COLUMNS = ("keep", "weights", "size", "bytes", "perplexity", "decode", "gates")
NOTE = (
    "bytes: beside the dense model in the run's own weights; perplexity: beside the dense model unrounded; decode: how "
    "many times faster than the dense model in the same weights. Intervals at 95 %."
)
_FIGURES = ("bytes", "bytes_ratio", "perplexity_ratio", "recovery", "decode", "decode_ms")


class _Stored(BaseModel):
    """A frontier as its file has it; what no sweep writes is refused, for `choose` would weigh it like the rest."""

    model_config = ConfigDict(extra="forbid", strict=True)
    sweep_version: Literal[1]
    points: tuple[FrontierPoint, ...] = Field(min_length=1)

    @field_validator("points")
    @classmethod
    def _measured(cls, points: tuple[FrontierPoint, ...]) -> tuple[FrontierPoint, ...]:
        """Refuse a name that is there twice, and a figure that is none; NaN is what a ruined model has."""
        for name, count in Counter(point.name for point in points).items():
            if count > 1:
                raise ValueError(f"{count} points are called {name[:60]!r}")
        for point, figure in ((point, figure) for point in points for figure in _FIGURES):
            value = getattr(point, figure)
            if value is not None and (value < 0 or (figure == "bytes" and value > MOST_NUMBER)):
                raise ValueError(f"{figure} of {point.name[:60]!r} is {str(value)[:60]}")
        return points


def point_of(results: Results, folder: str, dense_bytes: int) -> FrontierPoint:
    """Return the point of a run's results. `folder`: in the swept run; `dense_bytes`: what its bytes are beside."""
    found, work = results.perplexity, _decode(results.latency)
    recoveries = [task.recovery for task in results.tasks.values() if task.recovery is not None]
    keep, weights = results.sizes.keep_params, str(results.recipe["export"]["weights"])
    return FrontierPoint(
        name=f"{keep:g}" if weights == "same" else f"{keep:g} {weights}",
        bytes_ratio=results.sizes.bytes["onnx"] / dense_bytes,
        perplexity_ratio=found.ratio if found else None,
        chosen=folder == OWN,
        keep_params=keep,
        weights=weights,
        folder=folder,
        bytes=results.sizes.bytes["onnx"],
        perplexity_interval=found.ratio_interval if found else None,
        recovery=min(recoveries, default=None),
        decode=work.speedup.value if work else None,
        decode_interval=(work.speedup.low, work.speedup.high) if work else None,
        decode_ms=work.compressed.p50 if work else None,
        gates=_gates(results),
    )


def dense_point(results: Results, folder: str, dense_bytes: int) -> FrontierPoint:
    """Return the dense model that a run was timed against; its perplexity is known where nothing was rounded."""
    work, weights = _decode(results.latency), str(results.recipe["export"]["weights"])
    exact = weights == "same" and results.recipe["export"]["dtype"] == "float32"
    return FrontierPoint(
        name="dense" if weights == "same" else f"dense {weights}",
        bytes_ratio=results.sizes.bytes["onnx-dense"] / dense_bytes,
        perplexity_ratio=1.0 if exact else None,
        weights=weights,
        folder=folder,
        bytes=results.sizes.bytes["onnx-dense"],
        recovery=1.0 if exact and results.tasks else None,
        decode=1.0 if work else None,
        decode_ms=work.dense.p50 if work else None,
    )


def _decode(latency: LatencyFigures | None) -> WorkloadFigures | None:
    """Return the decode step after the fewest tokens, None if none was timed."""
    steps = [work for work in (latency.workloads if latency else {}).values() if work.past]
    return min(steps, key=lambda work: work.past, default=None)


def _gates(results: Results) -> Judgement:
    if not results.verdicts:
        return ""
    return "failed" if not results.passed else "unsure" if results.undecided else "passed"


def frontier_text(points: Sequence[FrontierPoint]) -> str:
    """Return the text of frontier.json."""
    document = {"sweep_version": SWEEP_VERSION, "points": [asdict(point) for point in points]}
    return json.dumps(document, indent=2) + "\n"


def read_frontier(path: Path) -> tuple[FrontierPoint, ...]:
    """Read a frontier.json; DataError if it is something else."""
    try:
        return _Stored.model_validate_json(read_text(path, AGAIN)).points
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}".removeprefix(": ")[:200]
        raise DataError(f"this is no frontier of a sweep: {reason}", fix=AGAIN, where=str(path)) from error


def frontier_table(points: Sequence[FrontierPoint]) -> Table | None:
    """Return the points as a table, largest first; None without any."""
    if not points:
        return None
    return Table("Sizes from one training", _COLUMNS, tuple(map(_row, sorted(points, key=lambda p: -p.bytes))), NOTE)


def _row(point: FrontierPoint) -> tuple[str, ...]:
    return (
        "dense" if point.keep_params is None else f"{point.keep_params:g}",
        point.weights,
        human_bytes(point.bytes),
        f"{point.bytes_ratio:.3f} ×",
        "n/a" if point.perplexity_ratio is None else ratio_text(point.perplexity_ratio, point.perplexity_interval),
        "n/a" if point.decode is None else ratio_text(point.decode, point.decode_interval, 2),
        point.gates or "-",
    )
