"""What stands between the network and the endpoints: keys, sizes, patience and places, so that no client harms another.

A request takes one of the places when it has arrived whole, and gives it back when it is answered or its client has
left. Reading a body has a bound in bytes and in seconds, waiting for a header and for a client that does not read its
answer one in seconds.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from dataclasses import dataclass
from typing import Any

from bodies import Refusal
from fastapi.responses import Response
from uvicorn.protocols.http.h11_impl import H11Protocol

CODES = {401: "invalid_api_key", 413: "request_too_large", 429: "rate_limit_exceeded"}


@dataclass(frozen=True)
class Limits:
    """`places`: requests inside, running or waiting; `body` in bytes; `patience` in seconds; `key` if one is asked."""

    places: int
    body: int = 1 << 20
    patience: float = 10.0
    key: str | None = None


def failure(
    status: int,
    message: str,
    headers: dict[str, str] | None = None,
    param: str | None = None,
    code: str | None = None,
) -> Response:
    """Return an error as OpenAI's clients read it."""
    content = json.dumps(error_body(status, message, param, code))
    return Response(content, status, headers, media_type="application/json")


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return OpenAI's error object."""
    kind = "rate_limit_error" if status == 429 else "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": param, "code": code or CODES.get(status)}}


class Door:
    """Let requests in one by one (ASGI): 401, 413, 408 and 429 are said here."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits
        self.inside, self.seconds = 0, 1.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on with its whole body, or answer it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if not self._allowed(scope["path"], headers):
            return await failure(401, "give the server's key: Authorization: Bearer KEY")(scope, receive, send)
        if scope["method"] != "POST":
            return await self.app(scope, receive, send)
        try:
            body = await asyncio.wait_for(self._read(headers, receive), self.limits.patience)
        except asyncio.TimeoutError:
            late = failure(408, f"the body was not here within {self.limits.patience:g} s", {"Connection": "close"})
            return await late(scope, receive, send)
        except Refusal as refusal:
            return await self._too_large(str(refusal), scope, receive, send)
        if body is not None:
            await self._answer(body, scope, receive, send)

    def _allowed(self, path: str, headers: dict[bytes, bytes]) -> bool:
        if self.limits.key is None or path == "/health":
            return True
        given = headers.get(b"authorization", b"").partition(b" ")[2].strip()
        return hmac.compare_digest(given, self.limits.key.encode())

    async def _read(self, headers: dict[bytes, bytes], receive: Any) -> bytes | None:
        """Return the whole body, None if the client leaves; Refusal as soon as it is known to be too large."""
        length = headers.get(b"content-length", b"0")
        found = bytearray()
        more = True
        while more:
            if max(len(found), int(length)) > self.limits.body:
                raise Refusal(413, f"a body may have {self.limits.body} bytes")
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            found += message.get("body", b"")
            more = message.get("more_body", False)
        if len(found) > self.limits.body:
            raise Refusal(413, f"a body may have {self.limits.body} bytes")
        return bytes(found)

    async def _too_large(self, message: str, scope: Any, receive: Any, send: Any) -> None:
        """Answer 413 at once, then drop what still comes for a while: a client that is cut off reads no answer."""
        said = failure(413, message, {"Connection": "close"})
        await send({"type": "http.response.start", "status": 413, "headers": said.raw_headers})
        await send({"type": "http.response.body", "body": said.body, "more_body": True})
        if b"expect" not in dict(scope["headers"]):  # who asks first does not send
            with_end = asyncio.wait_for(self._drop(receive), self.limits.patience)
            await asyncio.gather(with_end, return_exceptions=True)
        await send({"type": "http.response.body", "body": b""})

    async def _drop(self, receive: Any) -> None:
        message = {"more_body": True}
        while message.get("more_body", False):
            message = await receive()

    async def _answer(self, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        """Take a place for as long as the client is there, or answer 429."""
        if self.inside >= self.limits.places:
            wait = {"Retry-After": str(round(self.seconds + 0.5))}
            return await failure(429, "all places are taken, try again later", wait)(scope, receive, send)
        self.inside, start = self.inside + 1, time.monotonic()
        try:
            await self._while_there(body, scope, receive, send)
        finally:
            self.inside -= 1
            self.seconds += 0.2 * (time.monotonic() - start - self.seconds)  # what a request takes, lately

    async def _while_there(self, body: bytes, scope: Any, receive: Any, send: Any) -> None:
        """Run the endpoint, and cancel it when the client leaves, even while the request only waits for its turn."""
        messages = [{"type": "http.request", "body": body, "more_body": False}]
        gone = asyncio.Event()

        async def replay() -> dict[str, Any]:
            if messages:
                return messages.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def leave() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass

        answer, left = asyncio.ensure_future(self.app(scope, replay, send)), asyncio.ensure_future(leave())
        try:
            await asyncio.wait({answer, left}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.set()
            left.cancel()
            if not answer.done():
                answer.cancel()
            found = await asyncio.gather(answer, return_exceptions=True)
        if isinstance(found[0], Exception):
            raise found[0]


class Patient(H11Protocol):
    """HTTP/1.1 that drops who does not finish a header, or does not read an answer, within `patience` seconds."""

    patience = 10.0

    def connection_made(self, transport: Any) -> None:
        """Start the clock of the first header."""
        super().connection_made(transport)
        self._clock: asyncio.TimerHandle | None = None
        self._wind()

    def data_received(self, data: bytes) -> None:
        """Stop the clock when a request is under way; start it for one that has only begun."""
        super().data_received(data)
        if self.flow.write_paused:
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop()
        elif self._clock is None:
            self._wind()

    def pause_writing(self) -> None:
        """Start the clock of a client that does not read."""
        super().pause_writing()
        self._wind()

    def resume_writing(self) -> None:
        """Stop it."""
        super().resume_writing()
        self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock for good."""
        self._stop()
        super().connection_lost(exc)

    def _wind(self) -> None:
        self._stop()
        self._clock = self.loop.call_later(self.patience, self.transport.abort)

    def _stop(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None
