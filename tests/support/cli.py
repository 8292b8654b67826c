"""The command line as a user has it: in this process (fast), called from a script, or in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
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
# The command `soco-export` of `script`: it asks the process that runs the tests, which has imported everything.
ASKING = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as door:
    door.connect({door!r})
    door.sendall(json.dumps([os.getcwd(), sys.argv[1:]]).encode())
    door.shutdown(socket.SHUT_WR)
    code, out, err = json.loads(b"".join(iter(lambda: door.recv(2**16), b"")))
sys.stdout.write(out)
sys.stderr.write(err)
sys.exit(code)
"""


@dataclass(frozen=True)
class Ran:
    """What one command left: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def soco(*arguments: Any, plots: bool = False) -> Ran:
    """Run one command in this process; where nobody looks at the plots, a third of a short run's time is saved."""
    out, err = io.StringIO(), io.StringIO()
    drawn = (
        contextlib.nullcontext()
        if plots
        else patch("soco_export.report.pages.html.draw_plots", lambda *given: ([], ""))
    )
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


def script(*command: Any, folder: Path, **environment: str) -> Ran:
    """Run a program in `folder` whose calls of `soco-export` this process answers, which has imported what it needs."""
    with tempfile.TemporaryDirectory() as place, socket.socket(socket.AF_UNIX) as door:
        out, err, shim, address = (Path(place, name) for name in ("out", "err", "soco-export", "door"))
        shim.write_text(ASKING.format(python=sys.executable, door=str(address)), encoding="utf-8")
        shim.chmod(0o755)
        door.bind(str(address))
        door.listen()
        door.settimeout(0.05)
        found = {**os.environ, "PATH": f"{place}{os.pathsep}{os.environ['PATH']}", **environment}
        with out.open("wb") as output, err.open("wb") as errors:
            started = subprocess.Popen(list(map(str, command)), cwd=folder, env=found, stdout=output, stderr=errors)
        while started.poll() is None:
            with contextlib.suppress(TimeoutError):
                _answer(door.accept()[0])
        return Ran(started.returncode, out.read_text(encoding="utf-8"), err.read_text(encoding="utf-8"))


def _answer(asking: socket.socket) -> None:
    here = os.getcwd()
    with asking, asking.makefile("rb") as asked:
        asking.settimeout(None)
        folder, arguments = json.load(asked)
        os.chdir(folder)
        try:
            done = soco(*arguments)
        finally:
            os.chdir(here)
        asking.sendall(json.dumps([done.code, done.out, done.err]).encode())


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file under a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
