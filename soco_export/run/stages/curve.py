"""Training curves as JSON lines: what the loops report of each step, kept through interruptions without duplicates.

    {"stage": "train", "step": 12, "phase": 2, "kl": 0.183, "soft": 0.71, "hard": 0.68, "lr": 0.02}

Speeds are left out: the same training gives the same file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soco_export.files.atomic import write_atomic
from soco_train import parallel
from soco_train.bounded import MADE_ANEW, read_text
from soco_train.errors import DataError
from soco_train.events import Event, Notify

_Row = dict[str, Any]
SPEED = "tokens/s"


@contextmanager
def recording(notify: Notify, kept: Path, result: Path) -> Iterator[Notify]:
    """Give a `notify` that also keeps what is for the curve, in `kept` as it comes and in `result` at the end.

    What `kept` holds of an interrupted training stays, up to the step from which it goes on. Of several processes the
    leading one records.
    """
    if not parallel.leading():
        yield notify
        return
    rows = _recovered(kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(kept, _text(rows))
    with kept.open("a", encoding="utf-8", newline="\n") as file:

        def tell(event: Event) -> None:
            if event.record is not None:
                row = _row_of(event)
                _add(rows, row)
                file.write(json.dumps(row) + "\n")
                file.flush()
            notify(event)

        yield tell
    result.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(result, _text(rows))


def read_curve(path: Path) -> list[_Row]:
    """Return a curve's rows in order, one a step and stage; DataError if the file is something else."""
    rows: list[_Row] = []
    for number, line in enumerate(read_text(path, MADE_ANEW).splitlines(), 1):
        row = _parsed(line)
        if row is None:
            raise DataError(f"line {number} is no step of a training curve", fix=MADE_ANEW, where=str(path))
        _add(rows, row)
    return rows


def _recovered(kept: Path) -> list[_Row]:
    """Return what can be read: a process that was killed may have left half a line."""
    rows: list[_Row] = []
    for line in read_text(kept, MADE_ANEW).splitlines() if kept.exists() else ():
        if row := _parsed(line):
            _add(rows, row)
    return rows


def _row_of(event: Event) -> _Row:
    figures = {**event.values, **(event.record or {})}
    numbers = {name: value for name, value in figures.items() if isinstance(value, int | float) and name != SPEED}
    return {"stage": event.stage, "step": event.step, **numbers}


def _add(rows: list[_Row], row: _Row) -> None:
    """Put a row at the end: with the last one if it is of the same step, and instead of later ones of its stage."""
    while rows and rows[-1]["stage"] == row["stage"] and rows[-1]["step"] > row["step"]:
        rows.pop()
    if rows and (rows[-1]["stage"], rows[-1]["step"]) == (row["stage"], row["step"]):
        rows[-1] |= row
    else:
        rows.append(row)


def _parsed(line: str) -> _Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict) or type(row.get("step")) is not int or not isinstance(row.get("stage"), str):
        return None
    numbers = [value for name, value in row.items() if name != "stage"]
    return row if all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) else None


def _text(rows: Iterable[_Row]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)
