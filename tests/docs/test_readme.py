"""README.md does what it says: commands parse and run, snippets load, and the tour looks like what a run prints."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from soco_export import calling, cli
from soco_export.run.terminal import run_outcome
from tests.support.cli import soco

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SHELL = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
COMMANDS = [shlex.split(line, comments=True) for block in SHELL for line in block.splitlines()]
COMMANDS += [shlex.split(command) for command in re.findall(r"`(soco-export [a-z][^`]*)`", README)]
ON_A_RUN = [command for command in COMMANDS if "runs/demo" in command]
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def workplace(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which runs/demo is a finished run."""
    folder = tmp_path_factory.mktemp("readme")
    shutil.copytree(tiny_run, folder / "runs" / "demo")
    return folder


def execute(command: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / command[0]
    return subprocess.run([program, *command[1:]], cwd=cwd, env=os.environ, capture_output=True, text=True)


def test_the_first_lines_are_the_two_commands_and_make_knows_them() -> None:
    first = README.split("\n\n")[1].splitlines()
    assert [line.split()[:2] for line in first] == [["make", "demo"], ["make", "test"]]
    for target in ("demo", "test", "check", "test-compat", "clean", "tour"):
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_parses(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(calling, "_call", lambda verb, options: called.append(verb))
    cli.app(command[1:], standalone_mode=False)
    assert len(called) == 1


def test_the_commands_on_a_run_run_in_their_order(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    assert len(ON_A_RUN) > 3
    for program, *arguments in ON_A_RUN:
        assert program == "soco-export"  # whose start in a process of its own the dry run shows
        done = soco(*arguments)
        assert done.code == 0, f"{' '.join(arguments)}\n{done.out}{done.err}"
        assert done.out.strip()


def test_a_dry_run_needs_nothing(tmp_path: Path) -> None:
    (command,) = (command for command in COMMANDS if "--dry-run" in command)
    done = execute([*command, "--json"], tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)
    assert not list(tmp_path.iterdir())


@pytest.mark.transformers
def test_the_transformers_snippet_loads(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    exec(next(block for block in PYTHON if "transformers" in block), names)
    assert names["model"].num_parameters() > 0


@pytest.mark.optimum
def test_the_optimum_snippet_loads(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    names: dict[str, Any] = {}
    exec(next(block for block in PYTHON if "optimum" in block), names)
    assert names["model"].can_generate()


def test_the_tour_is_what_a_run_prints(tiny_run: Path) -> None:
    (tour,) = re.findall(r"<!-- tour: make tour -->\n```text\n(.*?)```", README, re.DOTALL)
    printed = run_outcome(tiny_run).text
    gates = re.compile(r"^(ok|FAILED)\s", re.MULTILINE)
    assert labels(gates.split(tour)[0]) == labels(gates.split(printed)[0])
    assert "FAILED" not in tour
    assert "runs/demo/report.md" in tour


def labels(text: str) -> list[str]:
    """What each line is about, however it is folded; a model as small as this one may be slower than dense or not."""
    lines = [line for line in text.splitlines() if not line.startswith(("note: slower than dense", " "))]
    return [re.sub(r"[\d.,]+M?", "#", line.split(":")[0]) for line in lines]
