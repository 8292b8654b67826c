"""The one kind of error a user sees, in both packages: what happened, where, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of the command line; part of the contract with users' CI jobs."""

    OK = 0
    CRASH = 1
    USAGE = 2
    GATE = 3
    MACHINE = 4


_LONGEST = 5000  # characters: a path has 4096 at most


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


class SocoError(Exception):
    """A failure that is the input's or the machine's, never ours.

    `message` says what happened, `fix` what to do, `where` names the file, key or layer; `code` is the exit code.
    """

    def __init__(self, message: str, *, fix: str, where: str = "", code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        # a value, key or name of any length may stand in them
        self.message, self.fix, self.where = _short(message), _short(fix), _short(where)
        self.code = code

    def __str__(self) -> str:
        place = f"\n  where: {self.where}" if self.where else ""
        return f"{self.message}\n  fix: {self.fix}{place}"


class RecipeError(SocoError):
    """The recipe, a flag or an input file is wrong; nothing was started (exit code 2)."""


class MachineError(SocoError):
    """The machine lacks something the recipe asks for: a provider, memory, disk (exit code 4)."""

    def __init__(self, message: str, *, fix: str, where: str = "") -> None:
        super().__init__(message, fix=fix, where=where, code=ExitCode.MACHINE)


class DataError(SocoError):
    """Weights, texts or losses are not what they must be: NaN, truncated, wrong encoding (exit code 2)."""


class PanicError(Exception):
    """A library written in Rust gave up; whoever called it says what that means."""


@contextmanager
def panics_as_errors() -> Iterator[None]:
    """Raise PanicError for a panic of Rust, which is no Exception and passes every door."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise PanicError(str(error)) from None
