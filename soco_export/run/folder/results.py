"""Results as a run wrote them: a results.json that is not as its manifest has it is refused."""

from __future__ import annotations

from pathlib import Path

from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.folder.manifest import check_unchanged


def load_results(path: Path) -> Results:
    """Read a results.json or the one of a run folder; RecipeError if it was changed since the run wrote it.

    A copy that lies beside no manifest (a committed baseline) is taken as it is.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    if file.name == RESULTS_FILE:
        check_unchanged(file.parent, [RESULTS_FILE])
    return Results.load(file)
