"""The only place that prints: results on stdout, progress on stderr; bars on a terminal, lines elsewhere, or JSON.

With `--json` stdout is exactly one JSON document, whatever a library may print meanwhile (that goes to stderr). A
stream that cannot take what is printed (its encoding, a full disk, a reader that has gone) never costs a command its
exit code.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from soco_export.files.text import visible
from soco_export.progress import Bars, Lines
from soco_train.errors import SocoError
from soco_train.events import Event

QUIET, NORMAL, VERBOSE = -1, 0, 1


class Console:
    """Shows events, results and errors of one command. `verbosity`: -1 quiet, 0 normal, 1 verbose."""

    def __init__(self, as_json: bool = False, verbosity: int = NORMAL) -> None:
        self.as_json = as_json
        self.verbosity = verbosity
        self._stdout = sys.stdout
        self._bars: Bars | None = None
        self._lines = Lines(verbosity >= VERBOSE)

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Keep stdout for the result and draw bars, where stderr is a terminal, until the work is over.

        What libraries warn their developers of is shown with `--verbose` alone, or where Python was asked to (-W).
        """
        bars = self.verbosity == NORMAL and sys.stderr.isatty()
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            if self.verbosity < VERBOSE and not sys.warnoptions:
                warnings.simplefilter("ignore")
            self._bars = Bars() if bars else None
            try:
                yield
            finally:
                if self._bars:
                    self._bars.close()

    def notify(self, event: Event) -> None:
        """Show one event."""
        if self.verbosity == QUIET:
            return
        with contextlib.suppress(OSError, ValueError):  # progress that nobody can see is no reason to stop
            (self._bars or self._lines).show(event)

    def result(self, document: Mapping[str, Any], text: str) -> None:
        """Print what the command was run for."""
        self._print(json.dumps(_plain(document), indent=2, allow_nan=False) if self.as_json else text)

    def error(self, error: SocoError) -> None:
        """Print what happened, how to fix it and where; no traceback (-v shows it)."""
        if self.as_json:
            self.fault(type(error).__name__, error.message, int(error.code), error.fix, error.where)
        if self.verbosity >= VERBOSE:
            say("".join(traceback.format_exception(error)))
        say(render_error(error))

    def fault(self, kind: str, message: str, code: int, fix: str = "", where: str = "") -> None:
        """Print, with `--json`, the document of a command that has failed."""
        if self.as_json:
            details = {"kind": kind, "message": message, "fix": fix, "where": where}
            self._print(json.dumps({"error": details, "exit_code": code}, indent=2))

    def warn(self, message: str) -> None:
        """Print a line on stderr that even `--quiet` shows."""
        say(message)

    def _print(self, text: str) -> None:
        problem = _write(self._stdout, text)
        if problem:
            say(f"the result could not be printed: {problem}")


def say(text: str) -> None:
    """Print on stderr, if that is possible."""
    _write(sys.stderr, text)


def tolerate_streams() -> None:
    """Let stdout and stderr show what their encoding does not have as escapes, and be there if they were closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open to the end)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _write(stream: Any, text: str) -> str:
    """Print `text`; return why it was not possible, "" if it was."""
    try:
        print(visible(text), file=stream, flush=True)
    except (OSError, ValueError) as error:
        _silence(stream)
        return str(error)
    return ""


def _silence(stream: Any) -> None:
    """Let what the stream still holds go nowhere: Python would try again at its end, and fail with code 120."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


def render_error(error: SocoError) -> str:
    """Return an error as house.md draws it: kind and message, then fix and where, a line each whatever they quote."""
    parts = [f"{type(error).__name__}: {error.message}", f"  fix: {error.fix}"]
    if error.where:
        parts.append(f"  where: {error.where}")
    return "\n".join(part.replace("\n", "\\n") for part in parts)


def _plain(value: Any) -> Any:
    """Return `value` as JSON has it: NaN and infinities, which JSON does not know, as strings; paths too."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
