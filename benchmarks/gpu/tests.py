"""a: the tests that need a GPU, by pytest itself. Without one, their twins on the CPU, which must pass everywhere."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.document import Figures
from benchmarks.gpu.options import CUDA, Options
from benchmarks.gpu.source import ROOT
from benchmarks.scale.parts import TimeUp

# the project's own options ask for plug-ins that a GPU machine need not have
PYTEST = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider"]
ASKED = ["-m", "gpu", "tests"] if CUDA else ["-m", "not gpu", "tests/train/test_devices.py"]


def parts(options: Options) -> Sequence[str]:
    """Return the one process."""
    return ["pytest"]


def pieces(options: Options, part: str, box: TimeBox) -> Iterator[tuple[str, object]]:
    """Yield the one run of pytest."""
    yield "pytest -m gpu" if CUDA else "the twins on the CPU", lambda: run_tests(box)


def run_tests(box: TimeBox) -> Figures:
    """Run the tests, and raise TimeUp if they take longer than there is time."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        try:
            subprocess.run([*PYTEST, f"--junitxml={report}", *ASKED], cwd=ROOT, timeout=box.left, check=False)
        except subprocess.TimeoutExpired:
            raise TimeUp from None
        return read_report(report.read_text(encoding="utf-8"))


def read_report(text: str) -> Figures:
    """Return how many passed and what failed, from JUnit's XML. No test at all is an error: nothing was shown."""
    cases = list(ElementTree.fromstring(text).iter("testcase"))
    bad = {
        case.get("name", ""): why
        for case in cases
        for why in (case.find("failure"), case.find("error"))
        if why is not None
    }
    skipped = sum(case.find("skipped") is not None for case in cases)
    figures = {
        "passed": len(cases) - len(bad) - skipped,
        "skipped": skipped,
        "failures": {name: (why.get("message") or "").split("\n")[0] for name, why in bad.items()},
        "slowest": {
            case.get("name", ""): float(case.get("time", 0))
            for case in sorted(cases, key=lambda case: -float(case.get("time", 0)))[:5]
        },
    }
    wrong = f"{len(bad)} failed: {', '.join(bad)}" if bad else "" if figures["passed"] else "no test was run"
    return {**figures, "error": wrong} if wrong else figures


def row(figures: Figures) -> str:
    """Say it in a few words."""
    return f"{figures['passed']} passed, {figures['skipped']} skipped"
