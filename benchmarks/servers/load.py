"""The load test of the OpenAI server: clients that stream, a queue that overflows, an end in the middle of an answer.

`room` has a place for every client: there must be no error and no 429. `crowd` has places for a quarter of them: the
others must be told to wait, wait as long as Retry-After says, and get their answers in the end. After that SIGTERM
arrives while an answer is on its way: it must still come whole, and the server must end by itself.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path

from benchmarks.servers.contenders import SERVER
from benchmarks.servers.process import HOST, free_port, serving, stop
from soco_export.bench.stats import Summary, summarise

PATIENCE = 600  # seconds until a client gives up


@dataclass
class Figures:
    """What the clients of one phase saw. Seconds, waiting included: `first` to the first token, `whole` to the last."""

    phase: str
    clients: int
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    tokens: int = 0
    turned_away: int = 0
    errors: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Say it in one line."""
        first, whole = (_percentiles(summarise(samples)) for samples in (self.first, self.whole))
        rate = self.tokens / self.seconds
        return (
            f"{self.phase}: {self.clients} clients, {len(self.whole)} answers, {rate:.1f} tokens/s together, "
            f"{len(self.errors)} errors, {self.turned_away} × 429\n"
            f"  first token {first}\n  whole answer {whole}"
        )


def load_test(folder: Path, clients: int, requests: int, tokens: int, prompts: Sequence[str]) -> list[Figures]:
    """Run the phases `room` and `crowd`, then the graceful end, against servers of their own."""
    found = []
    for phase, parallel, queue in (("room", 4, clients), ("crowd", 2, max(1, clients // 4 - 2))):
        port = free_port()
        command = [sys.executable, str(SERVER), str(folder), "--port", str(port)]
        with serving([*command, "--parallel", str(parallel), "--queue", str(queue)], port, "/health") as process:
            figures = Figures(phase, clients)
            start = time.monotonic()
            with ThreadPoolExecutor(clients) as pool:
                jobs = [pool.submit(_client, port, figures, requests, tokens, prompts[i:]) for i in range(clients)]
                for job in jobs:
                    job.result()
            figures.seconds = time.monotonic() - start
            if phase == "crowd":
                _end_in_the_middle(port, process, figures, tokens, prompts[0])
        _judge(figures)
        found.append(figures)
    return found


def _judge(figures: Figures) -> None:
    if figures.phase == "room" and figures.turned_away:
        figures.errors.append(f"{figures.turned_away} × 429 although there was room")
    if figures.phase == "crowd" and not figures.turned_away and figures.clients > 3:
        figures.errors.append("nobody was turned away although there was no room")


def _client(port: int, figures: Figures, requests: int, tokens: int, prompts: Sequence[str]) -> None:
    for number in range(requests):
        try:
            _request(port, figures, tokens, prompts[number % len(prompts)])
        except (OSError, HTTPException, ValueError) as error:
            figures.errors.append(repr(error))


def _request(port: int, figures: Figures, tokens: int, prompt: str) -> None:
    """Ask until there is a place; list.append is atomic, so clients share `figures`."""
    start = time.monotonic()
    while time.monotonic() - start < PATIENCE:
        status, wait, first, pieces = _stream(port, tokens, prompt)
        if status == 200:
            figures.first.append(first - start)
            figures.whole.append(time.monotonic() - start)
            figures.tokens += pieces
            return
        if status != 429 or wait is None:
            raise ValueError(f"status {status}, Retry-After {wait}")
        figures.turned_away += 1
        time.sleep(wait)
    raise ValueError(f"no place within {PATIENCE} s")


def _stream(
    port: int, tokens: int, prompt: str, begun: threading.Event | None = None
) -> tuple[int, float | None, float, int]:
    """Return (status, Retry-After, when the first token came, number of tokens); ValueError if the end is missing.

    begun: is set when the server has begun to answer.
    """
    connection = HTTPConnection(HOST, port, timeout=PATIENCE)
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if begun:
            begun.set()
        wait = response.getheader("Retry-After")
        if response.status != 200:
            response.read()
            return response.status, float(wait) if wait else None, 0.0, 0
        first, pieces, last = 0.0, 0, ""
        for raw in response:
            line = raw.decode().strip()
            first = first or time.monotonic()
            if line:
                pieces, last = pieces + (line != "data: [DONE]"), line
        if last != "data: [DONE]":
            raise ValueError(f"the stream broke off after {pieces} tokens")
        return 200, None, first, pieces
    finally:
        connection.close()


def _end_in_the_middle(port: int, process: subprocess.Popen[bytes], figures: Figures, tokens: int, prompt: str) -> None:
    with ThreadPoolExecutor(1) as pool:
        begun = threading.Event()
        answer = pool.submit(_stream, port, tokens, prompt, begun)
        begun.wait(PATIENCE)
        code = stop(process)
        try:
            if answer.result()[0] != 200:
                figures.errors.append("the answer that was on its way at SIGTERM did not come")
        except (OSError, HTTPException, ValueError) as error:
            figures.errors.append(f"SIGTERM cut an answer short: {error!r}")
    # uvicorn ends in order and then, as a good child, of the signal itself.
    if code not in (0, -signal.SIGTERM):
        figures.errors.append(f"the server ended with code {code} after SIGTERM")


def _percentiles(summary: Summary) -> str:
    values = {"p50": summary.p50, "p95": summary.p95, "p99": summary.p99}
    shown = (
        f"{name} n/a (n={summary.n})" if value is None else f"{name} {value:.2f} s" for name, value in values.items()
    )
    return " · ".join(shown)
