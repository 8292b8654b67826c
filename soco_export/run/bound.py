"""Results as a run wrote them: a results.json whose hash is not the one that its manifest has is refused."""

from __future__ import annotations

from pathlib import Path

from soco_export.files.records import record_file
from soco_export.report.schema import RESULTS_FILE, Results
from soco_export.run.manifest import Manifest
from soco_train.errors import DataError


def load_results(path: Path) -> Results:
    """Read a results.json or the one of a run folder; DataError if it was changed since the run wrote it.

    A copy that lies beside no manifest (a committed baseline) is taken as it is.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    results = Results.load(file)
    manifest = Manifest.load(file.parent)
    known = manifest.written.get(RESULTS_FILE) if manifest and file.name == RESULTS_FILE else None
    if known is not None and record_file(file).sha256 != known.sha256:
        raise DataError(
            f"{RESULTS_FILE} was changed after the run wrote it: its hash is not the one in manifest.json",
            fix=f"move it elsewhere; soco-export validate {file.parent} measures again",
            where=str(file),
        )
    return results
