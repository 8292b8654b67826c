"""The verb `choose`: one point of a sweep, with the reason for each that was left; reads only."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from soco_export.report.choose import Bound, Pick, Preference, choose
from soco_export.report.frontier import read_frontier
from soco_export.run.folder.manifest import check_unchanged
from soco_export.run.folder.names import FRONTIER_FILE
from soco_export.run.request import Outcome
from soco_train.errors import ExitCode, RecipeError
from soco_train.settings.section import as_bytes


def choose_point(run: Path, limits: Sequence[Bound], prefer: Preference) -> Outcome:
    """Pick a point of the run's sweep, with the reason for each that was left; none that fits is exit code 3."""
    if not (run / FRONTIER_FILE).is_file():
        raise RecipeError(
            f"{run} has no sweep to choose from",
            fix=f"soco-export sweep {run} --keep-params 0.9,0.8,0.6 --weights same,int8",
            where=str(run / FRONTIER_FILE),
        )
    check_unchanged(run, [FRONTIER_FILE])
    found = choose(read_frontier(run / FRONTIER_FILE), limits, prefer)
    document = {
        "run": str(run),
        "prefer": prefer,
        "limits": [asdict(limit) for limit in limits],
        "chosen": asdict(found.chosen) if found.chosen else None,
        "folder": str(run / found.chosen.folder) if found.chosen else None,
        "rejected": {name: list(reasons) for name, reasons in found.rejected.items()},
        "nearest": asdict(found.nearest) if found.nearest else None,
    }
    return Outcome(document, "\n".join(_lines(run, found, prefer)), ExitCode.OK if found.chosen else ExitCode.GATE)


def _lines(run: Path, found: Pick, prefer: Preference) -> Iterator[str]:
    if found.chosen:
        yield f"{found.chosen.name}: {run / found.chosen.folder} (the best in {prefer} of those that fit)"
    else:
        yield "none fits"
    for name, reasons in found.rejected.items():
        yield f"not {name}: {'; '.join(reasons)}"
    if found.nearest:
        yield f"nearest: {found.nearest.name}: {run / found.nearest.folder}"


def parse_limits(
    max_bytes: str | None, max_ppl_ratio: float | None, min_recovery: float | None, max_decode_ms: float | None
) -> list[Bound]:
    """Return the limits that were given; RecipeError for one that is no finite number from 0 on: all would meet it."""
    try:
        most = None if max_bytes is None else float(as_bytes(max_bytes))
    except ValueError:
        raise RecipeError(f"{max_bytes!r} is no size", fix="90MB, 85MiB or bytes", where="--max-bytes") from None
    given = (
        ("--max-bytes", "bytes", most, True),
        ("--max-ppl-ratio", "perplexity_ratio", max_ppl_ratio, True),
        ("--min-recovery", "recovery", min_recovery, False),
        ("--max-decode-ms", "decode_ms", max_decode_ms, True),
    )
    limits = [Bound(name, figure, value, at_most) for name, figure, value, at_most in given if value is not None]
    for limit in limits:
        if not 0 <= limit.value < math.inf:
            raise RecipeError(f"{limit.value:g} is no limit", fix="give a number from 0 on", where=limit.name)
    return limits
