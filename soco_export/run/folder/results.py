"""Results as a run wrote them: a results.json that is not as its manifest has it is refused."""

from __future__ import annotations

import os
from pathlib import Path

from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.folder.manifest import check_unchanged
from soco_export.run.folder.names import MANIFEST
from soco_train.errors import RecipeError


def load_results(path: Path) -> Results:
    """Read a results.json or the one of a run folder; RecipeError if it was changed since, or the run is not done.

    A copy that lies beside no manifest (a committed baseline) is taken as it is.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if path.is_dir() and (path / MANIFEST).is_file() and not os.path.lexists(file):
        raise RecipeError(
            f"{path.name} has no results yet: it was stopped, or is still at work",
            fix="let it end: the same command again, without --fresh, goes on where it was",
            where=str(path),
        )
    if file.name == RESULTS_FILE:
        check_unchanged(file.parent, [RESULTS_FILE])
    return Results.load(file)
