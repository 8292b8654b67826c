"""Start a server, wait until it answers, stop it; and the few lines of HTTP that the checks need."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from typing import Any

HOST = "127.0.0.1"
START_SECONDS, STOP_SECONDS = 300, 60
_HELD: list[socket.socket] = []


def free_port() -> int:
    """Return a port of the loopback interface that nobody else is given while this process lives.

    It stays bound, by a socket that never listens: a server may share it, as it reuses addresses, and a system that is
    asked for any free port gives another one.
    """
    held = socket.socket()
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    held.bind((HOST, 0))
    _HELD.append(held)
    return int(held.getsockname()[1])


def request(port: int, path: str, body: Any = None, seconds: float = 600) -> tuple[int, dict[str, str], Any]:
    """Return (status, headers, JSON) of a POST, or of a GET where there is no body."""
    connection = HTTPConnection(HOST, port, timeout=seconds)
    try:
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        headers = {key.lower(): value for key, value in response.getheaders()}
        return response.status, headers, json.loads(text) if text else None
    finally:
        connection.close()


@contextmanager
def serving(command: Sequence[str], port: int, ready: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `command` until the block ends, after GET `ready` has answered 200; RuntimeError with its log if it dies."""
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            _wait(process, port, ready, log)
            yield process
        finally:
            stop(process)


def stop(process: subprocess.Popen[bytes]) -> int:
    """Ask the server to end, insist after a minute, and return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    try:
        return process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, ready: str, log: Any) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if request(port, ready, seconds=5)[0] == 200:
                return
        except (OSError, HTTPException, ValueError):
            pass
        time.sleep(0.1)
    log.seek(0, os.SEEK_SET)
    said = log.read().decode(errors="replace").strip().splitlines()[-12:]
    raise RuntimeError("the server did not start:\n" + "\n".join(said))
