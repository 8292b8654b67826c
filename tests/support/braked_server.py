"""The example server with a brake, for tests whose outcome must not hang on who is faster.

    python tests/support/braked_server.py FOLDER --port 8000 [--until-full] [options of the server]

A request's seed says what befalls it at each token after its second: SLOW waits, so that 900 tokens take most of a
minute; BAD fails, and FATAL ends the model's thread. A prompt that begins with WATCHED is tokenised when /health has
answered meanwhile. With --until-full no token is computed before a request has been turned away.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SLOW, BAD, FATAL = 5, 13, 666
PAUSE = 0.05  # seconds before each token of a slow answer
WATCHED = "watched: "
PATIENCE = 60  # seconds that a test may keep the server waiting


def fail(error: BaseException) -> Callable[[], None]:
    """Return what raises `error`."""

    def raising() -> None:
        raise error

    return raising


BEFALLS = {SLOW: lambda: time.sleep(PAUSE), BAD: fail(UnicodeError("bad luck")), FATAL: fail(SystemExit())}


class Stream:
    """The tokenizer's stream, to which something befalls after two tokens."""

    def __init__(self, befall: Callable[[], None], stream: Any) -> None:
        self.befall, self.stream, self.left = befall, stream, 2

    def decode(self, token: int) -> str:
        self.left -= 1
        if self.left < 0:
            self.befall()
        return str(self.stream.decode(token))


def slow_down(worker: Any) -> None:
    """Let a request's seed say what befalls it."""
    begin = worker._begin

    def braked(self: Any, job: Any) -> None:
        begin(self, job)
        if job.seed in BEFALLS:
            job.stream = Stream(BEFALLS[job.seed], job.stream)

    worker._begin = braked


def wait_until_full(worker: Any, doors: Any) -> None:
    """Begin no answer before a request has been turned away."""
    begin, failure, full = worker._begin, doors.failure, threading.Event()

    def patient(self: Any, job: Any) -> None:
        full.wait(PATIENCE)
        begin(self, job)

    def told(status: int, *arguments: Any, **named: Any) -> Any:
        if status == 429:
            full.set()
        return failure(status, *arguments, **named)

    worker._begin, doors.failure = patient, told


def wait_for_health(worker: Any, api: Any) -> None:
    """Tokenise a watched prompt only when /health has answered meanwhile."""
    encode, health, seen = worker.encode, api.health, threading.Event()

    def watched(self: Any, text: str) -> Any:
        if text.startswith(WATCHED):
            seen.clear()
            if not seen.wait(PATIENCE):
                raise RuntimeError("nobody was answered while a text was tokenised")
        return encode(self, text)

    async def told(self: Any) -> Any:
        seen.set()
        return await health(self)

    worker.encode, api.health = watched, told


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "serve_openai"))
    import doors
    import server

    slow_down(server.Worker)
    wait_for_health(server.Worker, server.Api)
    if "--until-full" in sys.argv:
        sys.argv.remove("--until-full")
        wait_until_full(server.Worker, doors)
    server.main()
