"""One of the seeded kills of tests/whole/kills.py, another every time; `SOCO_KILLS=200` takes as many as that."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.support.fresh import SEED

ROOT = Path(__file__).parents[2]
WANTED = os.environ.get("SOCO_KILLS", "1")


def test_killed_runs_end_with_the_files_of_one_that_was_not(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.whole.kills", "--kills", WANTED]
    done = subprocess.run([*command, "--seed", str(SEED)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] >= int(WANTED)
    assert found["wrong"] == []
