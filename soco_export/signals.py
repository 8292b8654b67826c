"""Ctrl-C and SIGTERM: at once while nothing is at stake, as an exception while a command works, not at all at its end.

A supervisor ends a job by SIGTERM. It is to a run what Ctrl-C is: the checkpoints are there, and the code is 143.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from soco_train import stopping

INTERRUPTED, TERMINATED = 130, 143  # 128 + the signal's number, as shells have it
ENDINGS = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}
_AGAIN = 0.02  # seconds until a signal comes again that could not be received where it came

received: list[int] = []


def code() -> int:
    """Return the exit code of a command that a KeyboardInterrupt has ended."""
    return TERMINATED if signal.SIGTERM in received else INTERRUPTED


def leave_at_once() -> None:
    """End by these signals without a word of Python's: while modules are imported, an exception is a traceback."""
    _handle(lambda number, frame: os._exit(ENDINGS[signal.Signals(number)]))


@contextmanager
def raising() -> Iterator[None]:
    """Within this context the signals raise KeyboardInterrupt; after it the exit code is settled.

    A training finishes its step and saves before it raises; a second signal does not wait for that.
    SIGTERM has no exception of its own: libraries catch KeyboardInterrupt, tidy up, and raise a new one.
    """
    tell, sys.unraisablehook = sys.unraisablehook, _unraisable
    _handle(_raise)
    try:
        yield
    finally:
        _handle(signal.SIG_IGN)
        sys.unraisablehook = tell


def _raise(number: int, frame: FrameType | None) -> None:
    received.append(number)
    if _importing(frame):
        _give_again()
    elif not stopping.wish():
        raise KeyboardInterrupt


def _importing(frame: FrameType | None) -> bool:
    """Return whether a module is being imported: one of C++ that meets an exception there aborts the process."""
    while frame is not None and "importlib._bootstrap" not in frame.f_code.co_filename:
        frame = frame.f_back
    return frame is not None


def _unraisable(lost: sys.UnraisableHookArgs) -> None:
    """Give a signal again whose exception nobody could receive: it arrived in a destructor, or in a library's callback.

    Python would print it and go on: a traceback, and a command that does not end.
    """
    if received and lost.exc_type is KeyboardInterrupt:
        _give_again()
    else:
        sys.__unraisablehook__(lost)


def _give_again() -> None:
    threading.Timer(_AGAIN, signal.pthread_kill, [threading.main_thread().ident, received[-1]]).start()


def _handle(handler: Any) -> None:
    for number in ENDINGS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # a shell's background job, or nohup: it stays deaf
            signal.signal(number, handler)
