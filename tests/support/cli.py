"""The command line as a user has it: in this process (fast), or in one of its own (to kill it)."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from soco_export.cli import run

ROOT = Path(__file__).parents[2]
# Words for a run of a small model of the test's own, whose context is 128 tokens.
FEW_STEPS = tuple(
    word
    for setting in (
        *("train.steps=2", "train.batch_tokens=128", "train.statistics_blocks=2", "data.blocks=4", "data.block=128"),
        *("refine.distill.steps=0", "evaluation.blocks=1", "evaluation.block=128", "validate.parity.blocks=1"),
        *("validate.parity.greedy_prompts=1", "bench.enabled=false", "gates.max_ppl_ratio=null"),
    )
    for word in ("--set", setting)
)


@dataclass(frozen=True)
class Ran:
    """What one command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def soco(*arguments: Any, plots: bool = False) -> Ran:
    """Run one command in this process; where nobody looks at the plots, a third of a short run's time is saved."""
    out, err = io.StringIO(), io.StringIO()
    drawn = contextlib.nullcontext() if plots else patch("soco_export.report.html.draw_plots", lambda *given: ([], ""))
    with drawn, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Ran(code, out.getvalue(), err.getvalue())


def python(*arguments: Any, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, working in `folder`, with what this checkout holds."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        # whoever started the tests in the background may have made them, and so their children, deaf to interrupts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
