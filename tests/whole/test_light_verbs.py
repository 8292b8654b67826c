"""What neither trains nor loads a model answers without the libraries that take seconds to import; a refusal too."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from soco_export.model.source import BUILTIN_MODEL
from soco_export.run.folder.names import HELD

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
        ["plan", str(run), "--keep-params", "0.9,0.8,0.6"],
        ["plan", str(run), "--set", "storage=pivoted", "--set", "allocation=lagrangian"],
    ]
    for name, code, imported, answered in ran_in_one_process(commands, tmp_path):
        assert code in (0, 3), name
        assert imported == [], f"{name} imports {imported}"
        assert answered


def test_a_folder_that_cannot_be_written_is_refused_as_soon(tiny_run: Path, tmp_path: Path) -> None:
    """It took as long as importing PyTorch and transformers, and one in use as long as reading all weights."""
    run, other, edited = tmp_path / "run", tmp_path / "other", tmp_path / "edited"
    shutil.copytree(tiny_run, run)
    shutil.copytree(tiny_run, edited)
    with (edited / "hf" / "config.json").open("a") as file:
        file.write(" ")
    other.mkdir()
    (other / "mine.txt").touch()
    model = str(BUILTIN_MODEL)
    profile = ["--set", "optimise_for=latency", "--set", f"latency.profile={other / 'mine.txt'}"]
    with FileLock(run / HELD):
        refused = ran_in_one_process(
            [
                ["train-and-export", "--model", "tiny", "--out", str(other)],
                ["train-and-export", "--model", model, "--tiny", "--out", str(other)],
                ["train", "--model", "tiny", "--out", str(other / "mine.txt" / "below")],
                ["train", "--model", "tiny", "--set", "train.stepz=1"],
                ["train", "--model", "tiny", *profile],
                ["plan", str(run), *profile],
                ["train-and-export", "--model", "tiny", "--out", str(run)],
                ["export", str(run)],
                ["bench", str(run)],
                ["bench", str(edited)],
                ["validate", str(edited)],
                ["export", str(edited)],
                ["export", str(edited), "--keep-params", "0.8", "--out", str(edited)],
                ["export", model, "--out", str(other)],
                ["export", str(other)],
                ["bench", model, "--against", str(other)],
                ["validate", model, "--against", str(other)],
            ],
            tmp_path,
        )
    for name, code, imported, answered in refused:
        assert code in (2, 4), name
        assert imported == [], f"{name} imports {imported}"
        assert answered
    assert [path.name for path in other.iterdir()] == ["mine.txt"]


def test_a_plan_by_a_profile_that_is_kept_needs_no_torch(tiny_run: Path, tmp_path: Path) -> None:
    from soco_export.bench.device import Device
    from soco_export.bench.layer_times import FormTimes, Profile
    from soco_export.run.folder.allowed import read_lock
    from soco_train.store.importances import Importances

    recipe, scores = read_lock(tiny_run), Importances.load(tiny_run / "scores.safetensors").layers.values()
    conditions = Device("CPUExecutionProvider", 1, recipe.export, any(layer.deviates for layer in scores)).conditions()
    fast = FormTimes((2.0,) * len(conditions.tokens), (1,), ((1.0,) * len(conditions.tokens),))
    path = tmp_path / "profile.json"
    path.write_text(Profile(conditions, 1, {layer.shape: {"stacked": fast} for layer in scores}).to_json())
    command = ["plan", str(tiny_run), "--set", "optimise_for=latency", "--set", f"latency.profile={path}"]
    found = ran_in_one_process([command], tmp_path, ("torch", "transformers"))
    assert found == [["plan", 0, [], True]]


def test_scores_that_are_none_are_refused_as_soon(tiny_run: Path, tmp_path: Path) -> None:
    commands = []
    for case in ("absent", "edited", "cut off", "unlisted and cut off", "NaN"):
        shutil.copytree(tiny_run, run := tmp_path / case)
        file = run / "scores.safetensors"
        data = file.read_bytes()
        file.unlink()
        if case != "absent":
            file.write_bytes(data[:-4] + (b"" if "cut off" in case else b"\0\0\xc0\x7f"))
        if case in ("unlisted and cut off", "NaN"):
            (run / "manifest.json").unlink()
        commands.append(["plan", str(run), "--keep-params", "0.8"])
    for name, code, imported, answered in ran_in_one_process(commands, tmp_path):
        assert (name, code, imported, answered) == ("plan", 2, [], True)


def ran_in_one_process(commands: list[list[str]], folder: Path, heavy: Sequence[str] = HEAVY) -> list[Any]:
    """Return (verb, exit code, what heavy it has imported, whether it answered) of each command, run in `folder`."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([heavy, commands])],
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    assert not done.returncode, done.stderr
    ran = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in ran] == [command[0] for command in commands]
    return ran
