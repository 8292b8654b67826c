"""Many clients on the OpenAI server for a long time, some of whom leave: no error, and nothing that grows.

    python -m benchmarks.servers.soak --run runs/demo --seconds 600 --clients 64 --json soak.json

Each client asks for one of a few prompts, plainly or as a stream, and holds what it gets against the answer that an
idle server gave; two in five break the connection off at a random moment. Memory, threads and open files of the server
are looked at all the while: what is held at the end is set beside what was held once everything had been used (after a
quarter of the time). Exit code 1: a wrong answer, an error, a place that is not free again, or a leak.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from itertools import count
from pathlib import Path
from statistics import median

import psutil

from benchmarks.servers.contenders import SERVER
from benchmarks.servers.process import HOST, free_port, request, serving
from benchmarks.servers.prompts import PROMPTS

PATH = "/v1/completions"
LEAVING = 0.4  # of all requests
GROWTH = 1.10  # of memory between a quarter of the time and its end: more is a leak
TOKENS, MANY = 12, 300
ADDING = threading.Lock()


@dataclass
class Soak:
    """What was seen. `memory`: MiB; `files`, `threads`: counts; each (after a quarter of the time, at the end)."""

    clients: int
    seconds: float
    answers: int = 0
    left: int = 0
    turned_away: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    memory: tuple[float, float] = (0.0, 0.0)
    files: tuple[int, int] = (0, 0)
    threads: tuple[int, int] = (0, 0)
    free_again: bool = False

    @property
    def good(self) -> bool:
        """Whether nothing went wrong, and nothing grew."""
        grew = self.memory[1] > GROWTH * self.memory[0] or self.files[1] > self.files[0] + self.clients
        return not self.errors and self.free_again and not grew and self.answers > 0


def main(argv: Sequence[str] | None = None) -> int:
    """Soak a server and print what was seen; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.servers.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--run", type=Path, required=True, help="a finished run")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    given = parser.parse_args(argv)
    found = soak(given.run / "onnx", given.clients, given.seconds, given.seed)
    text = json.dumps({**asdict(found), "good": found.good}, indent=1) + "\n"
    sys.stdout.write(text)
    if given.json:
        given.json.write_text(text, encoding="utf-8")
    return int(not found.good)


def soak(folder: Path, clients: int, seconds: float, seed: int = 0) -> Soak:
    """Serve `folder` to so many clients for so long."""
    port, found = free_port(), Soak(clients, seconds)
    command = [
        sys.executable,
        str(SERVER),
        str(folder),
        "--port",
        str(port),
        "--parallel",
        "4",
        "--queue",
        str(clients),
    ]
    with serving(command, port, "/health") as process:
        right = [_ask(port, prompt)[1] for prompt in PROMPTS[:4]]
        end = time.monotonic() + seconds
        with ThreadPoolExecutor(clients + 1) as pool:
            watched = pool.submit(_watch, psutil.Process(process.pid), end)
            jobs = [pool.submit(_client, port, found, right, end, seed * clients + i) for i in range(clients)]
            for job in jobs:
                job.result()
            _compare(found, watched.result())
        with ThreadPoolExecutor(clients) as pool:
            last = list(pool.map(lambda _: _ask(port, PROMPTS[0])[0], range(clients)))
        found.free_again = last == [200] * clients and request(port, "/health")[0] == 200
    return found


def _client(port: int, found: Soak, right: Sequence[str], end: float, seed: int) -> None:
    """Ask once and until the time is over, and add what was seen to what the others saw."""
    luck, seen, errors = random.Random(seed), Counter[str](), Counter[str]()
    for asked in count():
        if asked and time.monotonic() >= end:
            break
        number = luck.randrange(len(right))
        try:
            if luck.random() < LEAVING:
                leave(port, PROMPTS[number], luck.random() < 0.5, luck.random() * 0.5)
                seen["left"] += 1
                continue
            status, text = _ask(port, PROMPTS[number])
        except (OSError, HTTPException, ValueError) as error:
            errors[type(error).__name__] += 1
            continue
        if status == 429:
            seen["turned away"] += 1
        elif (status, text) == (200, right[number]):
            seen["answers"] += 1
        else:
            errors[f"{status} {text[:40]!r}"] += 1
    with ADDING:
        found.answers, found.left = found.answers + seen["answers"], found.left + seen["left"]
        found.turned_away += seen["turned away"]
        found.errors.update(errors)


def _ask(port: int, prompt: str) -> tuple[int, str]:
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    status, _, answer = request(port, PATH, body, seconds=120)
    return status, answer["choices"][0]["text"] if status == 200 else json.dumps(answer)


def leave(port: int, prompt: str, stream: bool, after: float) -> None:
    """Ask for a long answer, and break the connection off after so many seconds."""
    raw = json.dumps({"prompt": prompt, "max_tokens": MANY, "temperature": 0, "stream": stream}).encode()
    with socket.create_connection((HOST, port), timeout=120) as line:
        head = (
            f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        )
        line.sendall(head.encode() + raw)
        time.sleep(after)


def _watch(process: psutil.Process, end: float) -> list[tuple[float, int, int]]:
    """Return (MiB, open files, threads) of the server, some hundred times until `end`."""
    seen, step = [], max(0.1, (end - time.monotonic()) / 400)
    while time.monotonic() < end:
        seen.append((process.memory_info().rss / 2**20, process.num_fds(), process.num_threads()))
        time.sleep(step)
    return seen


def _compare(found: Soak, seen: Sequence[tuple[float, int, int]]) -> None:
    """Set the last tenth beside a tenth after a quarter of the time, by their medians."""
    width = max(1, len(seen) // 10)
    early, late = seen[len(seen) // 4 :][:width], seen[-width:]
    (m1, f1, t1), (m2, f2, t2) = (tuple(median(column) for column in zip(*part, strict=True)) for part in (early, late))
    found.memory, found.files, found.threads = (round(m1, 1), round(m2, 1)), (int(f1), int(f2)), (int(t1), int(t2))


if __name__ == "__main__":
    sys.exit(main())
