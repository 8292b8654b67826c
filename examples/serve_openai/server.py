"""An OpenAI-compatible server for one exported folder: FastAPI in front, onnxruntime-genai behind.

    python examples/serve_openai/server.py runs/demo/onnx --port 8000

POST /v1/completions and /v1/chat/completions, plain or streamed; GET /v1/models and /health. One thread owns the model
(worker.py). `--parallel` requests run, `--queue` more wait; who comes after that gets 429 and a Retry-After. SIGTERM
and Ctrl-C let what runs finish. A parameter that is not implemented is refused by name, never ignored. A request that
fails is answered with 500, or with an error event in its stream, and spoils no other.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from worker import Failed, Job, Piece, Worker

DEAD = "the model's thread has ended: restart the server"


class Options(BaseModel):
    """What both endpoints take; an unknown field is an error."""

    model_config = ConfigDict(extra="forbid")
    model: str | None = None
    max_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0)
    stream: bool = False
    user: str | None = None
    return_token_ids: bool = False  # as in vLLM: the ids, of the prompt and of the answer


class Completion(Options):
    """The body of /v1/completions."""

    prompt: str


class Message(BaseModel):
    """One turn of a conversation."""

    role: str
    content: str


class Chat(Options):
    """The body of /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)


class Gate:
    """Count the requests inside, streamed bodies included, and turn away those that find no place (ASGI)."""

    def __init__(self, app: Any, places: int) -> None:
        self.app, self.places, self.inside, self.seconds = app, places, 0, 1.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass the request on, or answer 429."""
        if scope["type"] != "http" or scope["method"] != "POST":
            return await self.app(scope, receive, send)
        if self.inside >= self.places:
            busy = failure(
                429, "all places are taken, try again later", {"Retry-After": str(round(self.seconds + 0.5))}
            )
            return await busy(scope, receive, send)
        self.inside, start = self.inside + 1, time.monotonic()
        try:
            await self.app(scope, receive, send)
        finally:
            self.inside -= 1
            self.seconds += 0.2 * (time.monotonic() - start - self.seconds)  # what a request takes, lately


def failure(status: int, message: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message), status, headers)


def error_body(status: int, message: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "code": status}}


class Api:
    """The endpoints over one worker."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker, self.name = worker, name

    async def health(self) -> Any:
        """GET /health; without the model's thread nothing is served."""
        return {"status": "ok"} if self.worker.is_alive() else failure(503, DEAD)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [{"id": self.name, "object": "model", "owned_by": "soco-export"}]}

    async def complete(self, body: Completion, request: Request) -> Any:
        """POST /v1/completions."""
        return await self._answer(body, self.worker.encode(body.prompt), request, chat=False)

    async def converse(self, body: Chat, request: Request) -> Any:
        """POST /v1/chat/completions."""
        if not self.worker.chats:
            return failure(400, "this model has no chat template: use /v1/completions")
        turns = [turn.model_dump() for turn in body.messages]
        return await self._answer(body, self.worker.encode_chat(turns), request, chat=True)

    async def _answer(self, body: Options, ids: list[int], request: Request, chat: bool) -> Any:
        if not self.worker.is_alive():
            return failure(503, DEAD)
        room = self.worker.context
        if not ids or len(ids) + body.max_tokens > room:
            return failure(400, f"{len(ids)} tokens and max_tokens {body.max_tokens}: there is room for 1 to {room}")
        job = Job(ids, body.max_tokens, body.temperature, body.top_p, body.seed)
        head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.name}
        if body.stream:
            return StreamingResponse(self._events(job, head, body, chat), media_type="text/event-stream")
        pieces: list[Piece] = []
        async for piece in self.worker.pieces(job):
            pieces.append(piece)
            if await request.is_disconnected():
                break
        text, tokens = "".join(piece.text for piece in pieces), [piece.token for piece in pieces]
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(tokens), "total_tokens": len(ids) + len(tokens)}
        extra = {"prompt_token_ids": ids, "token_ids": tokens} if body.return_token_ids else {}
        choice = {"index": 0, **said, "finish_reason": pieces[-1].finish, **extra}
        kind = "chat.completion" if chat else "text_completion"
        return {**head, "object": kind, "choices": [choice], "usage": usage}

    async def _events(self, job: Job, head: dict[str, Any], body: Options, chat: bool) -> AsyncIterator[str]:
        """Server-sent events; a client that leaves ends the iteration, and so the job."""
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        try:
            async for piece in self.worker.pieces(job):
                yield event({**head, "choices": [self._delta(piece, body, chat)]})
        except Failed as failed:
            # The status is sent already. No [DONE] follows: the answer is not whole.
            yield event(error_body(500, str(failed)))
            return
        yield "data: [DONE]\n\n"

    def _delta(self, piece: Piece, body: Options, chat: bool) -> dict[str, Any]:
        said = {"delta": {"role": "assistant", "content": piece.text}} if chat else {"text": piece.text}
        extra = {"token_ids": [piece.token]} if body.return_token_ids else {}
        return {"index": 0, **said, "finish_reason": piece.finish, **extra}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
    first = error.errors()[0]
    return failure(400, f"{'.'.join(map(str, first['loc'][1:]))}: {first['msg']}")


async def confess(request: Request, failed: Failed) -> JSONResponse:
    return failure(500, str(failed))


def create_app(folder: Path, parallel: int, queue: int) -> FastAPI:
    worker = Worker(folder, parallel)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app, api = FastAPI(title="soco-export", lifespan=lifespan), Api(worker, folder.resolve().name)
    app.add_middleware(Gate, places=parallel + queue)
    app.add_exception_handler(RequestValidationError, refuse)
    app.add_exception_handler(Failed, confess)
    app.add_api_route("/health", api.health, response_model=None)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", api.converse, methods=["POST"], response_model=None)
    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--parallel", type=int, default=4, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait")
    parser.add_argument("--grace", type=int, default=30, help="seconds that running requests get to finish at the end")
    given = parser.parse_args()
    app = create_app(given.folder, given.parallel, given.queue)
    uvicorn.run(app, host=given.host, port=given.port, timeout_graceful_shutdown=given.grace, log_level="warning")


if __name__ == "__main__":
    main()
