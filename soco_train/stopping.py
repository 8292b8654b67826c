"""A wish to stop, heard between two steps of a training: it saves what it has learnt, then ends.

Whoever receives the wish (soco_export/signals.py: SIGTERM, Ctrl-C) asks `wish()`; a second one is not waited for.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class _State:
    listening: bool = False
    wished: bool = False


_state = _State()


@contextmanager
def listening() -> Iterator[None]:
    """Within this context a wish to stop waits for `wished` to be asked; it is forgotten at the end."""
    _state.listening, _state.wished = True, False
    try:
        yield
    finally:
        _state.listening = _state.wished = False


def wish() -> bool:
    """Ask the training to stop after its step; False if none listens, or if it has been asked before."""
    heard = _state.listening and not _state.wished
    _state.wished = _state.wished or heard
    return heard


def wished() -> bool:
    """Tell whether somebody wants the training to stop."""
    return _state.wished
