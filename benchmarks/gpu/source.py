"""The checkout that the code is in: its commit, and how large it is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def commit() -> str:
    """Return the commit, with -dirty where files differ; $SOCO_COMMIT outside a checkout, "" where nothing says it."""
    try:
        return _git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*").strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("SOCO_COMMIT", "")


def tracked_bytes() -> int:
    """Return the bytes of all files that git tracks."""
    paths = [ROOT / name for name in _git("ls-files", "-z").split("\0") if name]
    return sum(path.stat().st_size for path in paths if path.is_file())


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True).stdout
