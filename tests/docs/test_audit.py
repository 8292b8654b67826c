"""tools/audit.py finds what is installed in a database of advisories, and says when there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
HERE = version("safetensors")


def audit(**environment: str) -> subprocess.CompletedProcess[str]:
    plain = {name: value for name, value in os.environ.items() if name != "SOCO_ADVISORIES"}
    command = [sys.executable, ROOT / "tools" / "audit.py"]
    return subprocess.run(command, env={**plain, **environment}, capture_output=True, text=True)


def test_without_a_database_it_says_that_it_skips() -> None:
    done = audit()
    assert done.returncode == 0
    assert done.stdout.startswith("skipped")


@pytest.mark.parametrize(
    ("part", "found"),
    [
        ({"versions": [HERE]}, True),
        ({"versions": ["0.0.1"]}, False),
        ({"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}]}]}, True),
        ({"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": HERE}]}]}, False),
        ({"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "999"}]}]}, True),
        ({"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"last_affected": HERE}]}]}, True),
        ({"ranges": [{"type": "ECOSYSTEM", "events": [{"introduced": "998"}]}]}, False),
        ({"ranges": [{"type": "GIT", "events": [{"introduced": "0"}]}]}, False),
    ],
)
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_versions_and_ranges_are_met(part: dict[str, Any], found: bool, suffix: str, tmp_path: Path) -> None:
    package = {"ecosystem": "PyPI", "name": "Safe_Tensors".replace("_T", "t")}
    advisory = {"id": "PYSEC-0", "summary": "it is bad", "affected": [{"package": package, **part}]}
    (tmp_path / f"a.{suffix}").write_text(json.dumps(advisory))
    done = audit(SOCO_ADVISORIES=str(tmp_path))
    assert done.returncode == int(found), done.stdout + done.stderr
    assert ("PYSEC-0" in done.stdout) == found
