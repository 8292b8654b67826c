"""The verdict's exit code survives every stream, every signal has its code, and --json is one document always."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from soco_export import signals
from soco_export.console import Console
from tests.support.cli import ROOT, soco

STRANGE = "vérité ✓ → \x1b[31m \ud800"


def hearing() -> None:
    """Have Python's own handler of SIGINT, which whoever runs the tests in the background has taken away."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def said_by(script: str, *modules: Path) -> tuple[str, str]:
    """Return what a script writes to stdout and stderr; `modules`: folders that it imports from, beside ours."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *modules)))}
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=hearing,
    )
    return done.stdout, done.stderr


def run(*arguments: str, **settings: Any) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings.pop("env", {})}
    return subprocess.run([sys.executable, "-m", "soco_export", *arguments], env=environment, **settings)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16"])
def test_any_encoding_shows_what_it_can(encoding: str) -> None:
    done = run("recipes", "show", "tiny", env={"PYTHONIOENCODING": encoding, "LC_ALL": "C"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    done = run(
        "recipes", "show", STRANGE.replace("\ud800", ""), env={"PYTHONIOENCODING": encoding}, capture_output=True
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr.decode(encoding)
    assert "\x1b" not in done.stderr.decode(encoding)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_or_a_reader_that_has_gone_keeps_the_code() -> None:
    with open("/dev/full", "wb") as full:
        done = run("recipes", "list", stdout=full, stderr=subprocess.PIPE)
        assert (done.returncode, b"could not be printed" in done.stderr) == (0, True)
        assert run("recipes", "show", "nope", stdout=full, stderr=full).returncode == 2
    read, write = os.pipe()
    os.close(read)
    for streams in ({"stdout": write, "stderr": write}, {"preexec_fn": lambda: (os.close(1), os.close(2))}):
        assert run("recipes", "list", **streams).returncode == 0
        assert run("recipes", "show", "nope", "--json", **streams).returncode == 2
    os.close(write)


@pytest.mark.parametrize(
    "arguments",
    [
        ("plan", "--nope"),
        ("--nope",),
        ("export",),
        ("nope",),
        ("train", "--seed", "x"),
        ("compare", "a"),
        ("bench", "/x"),
    ],
)
def test_json_is_one_document_for_a_usage_error(arguments: tuple[str, ...]) -> None:
    done = soco(*arguments, "--json")
    found = json.loads(done.out)
    assert found["exit_code"] == done.code == 2
    assert found["error"]["message"]
    assert "Traceback" not in done.err


def test_json_is_one_document_for_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(request: Any, notify: Any) -> None:
        raise ZeroDivisionError("of ours")

    monkeypatch.setattr("soco_export.run.verbs.doctor", crash)
    done = soco("doctor", "--json")
    assert (json.loads(done.out)["exit_code"], done.code) == (1, 1)
    assert "ZeroDivisionError: of ours" in done.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_end_from_outside_is_one_document_too(number: int, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def end(request: Any, notify: Any) -> None:
        signals._raise(number, None)

    monkeypatch.setattr(signals, "received", [])
    monkeypatch.setattr("soco_export.run.verbs.doctor", end)
    done = soco("doctor", "--json")
    assert (json.loads(done.out)["exit_code"], done.code) == (code, code)
    assert "the same command starts again" in done.err  # it has nothing to go on from


def test_progress_that_cannot_be_shown_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from soco_train.events import Event

    class Gone:
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def flush(self) -> None:
            raise BrokenPipeError

        def fileno(self) -> int:
            raise OSError

    monkeypatch.setattr(sys, "stderr", Gone())
    console = Console()
    console.notify(Event("train", 0, 1))
    console.warn("still here")


@pytest.mark.parametrize(
    ("number", "code", "moments"),
    [(signal.SIGINT, 130, (0.02, 0.1, 0.25, 0.8)), (signal.SIGTERM, 143, (0.06, 0.15, 0.4))],
)
def test_a_signal_in_the_first_second_leaves_no_traceback(
    number: signal.Signals, code: int, moments: tuple[float, ...]
) -> None:
    """Once the first line of ours has run, every moment is ours, in seconds."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    start = (
        "import os, sys; from soco_export import __main__; __main__.leave_at_once(); os.write(1, b'x'); "
        "sys.argv[1:] = ['doctor']; __main__.main()"
    )
    for after in moments:
        with subprocess.Popen(
            [sys.executable, "-c", start],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=hearing,
        ) as process:
            assert process.stdout
            process.stdout.read(1)
            time.sleep(after)
            process.send_signal(number)
            _, said = process.communicate()
        assert b"Traceback" not in said, (after, said)
        assert process.returncode in (0, 4, code), (after, said)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_a_destructor_received_ends_the_command_all_the_same(number: signal.Signals) -> None:
    """Python prints such an exception and goes on; ours comes again where it can be received."""
    start = f"""
import signal, time
from soco_export import signals

class Receiving:
    def __del__(self):
        signal.raise_signal({number:d})

try:
    with signals.raising():
        Receiving()
        time.sleep(200)
except KeyboardInterrupt:
    print(signals.code())
"""
    assert said_by(start) == (f"{signals.ENDINGS[number]}\n", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_during_an_import_waits_for_its_end(number: signal.Signals, tmp_path: Path) -> None:
    """A module of C++ that meets an exception while it is imported ends the process by SIGABRT or SIGSEGV."""
    (tmp_path / "imported.py").write_text(f"import signal\nsignal.raise_signal({number:d})\nwhole = True\n")
    start = """
import time
from soco_export import signals

try:
    with signals.raising():
        import imported
        time.sleep(200)
except KeyboardInterrupt:
    print(imported.whole, signals.code())
"""
    assert said_by(start, tmp_path) == (f"True {signals.ENDINGS[number]}\n", "")
