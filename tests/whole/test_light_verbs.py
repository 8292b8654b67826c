"""Verbs that neither train nor load a model answer without the libraries that take seconds to import."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

HEAVY = ("torch", "transformers", "onnxruntime")
# One process runs all verbs: what one of them imports the next ones would find, and each is asked after it has run.
PROGRAM = """
import contextlib, io, json, sys
from soco_export.cli import run
heavy, commands = json.loads(sys.argv[1])
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = run([*command, "--json"])
    imported = [name for name in heavy if name in sys.modules]
    print(json.dumps([command[0], code, imported, bool(json.loads(out.getvalue()))]))
"""


def test_they_import_nothing_heavy(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    commands = [
        ["recipes", "list"],
        ["recipes", "list", "--methods"],
        ["recipes", "show", "tiny"],
        ["recipes", "check", "tiny"],
        ["doctor"],
        ["compare", str(run), str(run)],
        ["gate", str(run)],
        ["report", str(run)],
    ]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([HEAVY, commands])],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert not done.returncode, done.stderr
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in ran] == [command[0] for command in commands]
    for name, code, imported, answered in ran:
        assert code in (0, 3), (name, code, done.stderr)
        assert imported == [], f"{name} imports {imported}"
        assert answered
