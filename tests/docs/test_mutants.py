"""The list of planted faults follows the code: what each replaces stands in its file, once, and its tests exist."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import yaml

from tests.support.cli import ROOT

FAULTS = yaml.safe_load((ROOT / "tools" / "mutants.yaml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault["name"])
def test_a_fault_can_be_planted(fault: dict[str, Any]) -> None:
    assert (ROOT / fault["file"]).read_text(encoding="utf-8").count(fault["old"]) == 1
    assert (ROOT / shlex.split(fault["tests"])[0]).is_file()
