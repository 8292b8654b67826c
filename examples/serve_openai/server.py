"""An OpenAI-compatible server for one exported folder: FastAPI in front, onnxruntime-genai behind.

    python examples/serve_openai/server.py runs/demo/onnx --port 8000

POST /v1/completions and /v1/chat/completions, plain or streamed; GET /v1/models, /v1/models/NAME and /health. One
thread owns the model (worker.py). `--parallel` requests run, `--queue` more wait; who comes after that gets 429 and a
Retry-After. SIGTERM and Ctrl-C let what runs finish. What is not implemented is accepted where it asks for the default
and refused by name otherwise (bodies.py). A request that fails is answered with 500, or with an error event in its
stream, and spoils no other; nor does a client that is slow, greedy or gone (doors.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import uvicorn
from bodies import Chat, Completion, Options, Refusal, read_body
from doors import Door, Limits, Patient, error_body, failure
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from worker import Failed, Job, Piece, Worker

DEAD = "the model's thread has ended: restart the server"
SHORT = (
    16  # tokens of a completion that sets no max_tokens, as in OpenAI's API; a chat goes on as long as there is room
)
CONNECTIONS = 512  # at once, idle ones included: others get 503
KEY = "SERVE_API_KEY"


class Api:
    """The endpoints over one worker."""

    def __init__(self, worker: Worker, name: str) -> None:
        self.worker = worker
        self.card = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "soco-export"}

    async def health(self) -> Any:
        """GET /health; without the model's thread nothing is served."""
        return {"status": "ok"} if self.worker.is_alive() else failure(503, DEAD)

    async def models(self) -> dict[str, Any]:
        """GET /v1/models."""
        return {"object": "list", "data": [self.card]}

    async def model(self, name: str) -> dict[str, Any]:
        """GET /v1/models/NAME."""
        self._check_name(name)
        return self.card

    async def complete(self, request: Request) -> Any:
        """POST /v1/completions."""
        body = read_body(Completion, await request.body())
        prompts = [await self._ids(self._encode, prompt) for prompt in body.prompts]
        return await self._answer(body, prompts, chat=False)

    async def converse(self, request: Request) -> Any:
        """POST /v1/chat/completions."""
        body = read_body(Chat, await request.body())
        if not self.worker.chats:
            raise Refusal(400, "this model has no chat template: use /v1/completions")
        turns = [turn.turn() for turn in body.messages]
        return await self._answer(body, [await self._ids(self.worker.encode_chat, turns)], chat=True)

    def _check_name(self, name: str | None) -> None:
        if name not in (None, self.card["id"]):
            message = f"the model {str(name)[:100]!r} is not served here, only {self.card['id']!r}"
            raise Refusal(404, message, "model", "model_not_found")

    async def _ids(self, encode: Callable[[Any], list[int]], prompt: Any) -> list[int]:
        """Tokenise beside the event loop, which has other clients."""
        try:
            return await asyncio.to_thread(encode, prompt)
        except ValueError as error:
            raise Refusal(400, str(error), code="context_length_exceeded" if "room" in str(error) else None) from None

    def _encode(self, prompt: str | list[int]) -> list[int]:
        if isinstance(prompt, str):
            return self.worker.encode(prompt)
        if max(prompt) >= self.worker.vocabulary:
            raise ValueError(f"token {max(prompt)} of {self.worker.vocabulary}")
        return prompt

    def _jobs(self, body: Options, prompts: Sequence[list[int]], chat: bool) -> list[Job]:
        """Return a job for each prompt; Refusal if there is no room for its answer."""
        room, jobs = self.worker.context, []
        for ids in prompts:
            usual = room - len(ids) if chat else min(SHORT, room - len(ids))
            wanted = body.max_tokens or max(1, usual)
            if not ids or len(ids) + wanted > room:
                said = f"{len(ids)} tokens and max_tokens {wanted}: there is room for 1 to {room}"
                raise Refusal(400, said, "max_tokens" if body.max_tokens else None, "context_length_exceeded")
            temperature = 0.0 if body.top_p == 0 else 1.0 if body.temperature is None else body.temperature
            jobs.append(Job(ids, wanted, temperature, 1.0 if body.top_p is None else body.top_p, body.seed))
        return jobs

    async def _answer(self, body: Options, prompts: Sequence[list[int]], chat: bool) -> Any:
        self._check_name(body.model)
        if not self.worker.is_alive():
            return failure(503, DEAD)
        jobs = self._jobs(body, prompts, chat)
        name = "chatcmpl" if chat else "cmpl"
        head = {"id": f"{name}-{uuid.uuid4().hex}", "created": int(time.time()), "model": self.card["id"]}
        if body.stream:
            return StreamingResponse(self._events(jobs, head, body, chat), media_type="text/event-stream")
        choices, count = [], 0
        for index, job in enumerate(jobs):
            pieces = [piece async for piece in self._pieces(job, body.stops)]
            choices.append({"index": index, **_choice(job, pieces, body, chat)})
            count += len(pieces)
        kind = "chat.completion" if chat else "text_completion"
        return {**head, "object": kind, "choices": choices, "usage": _usage(jobs, count)}

    async def _pieces(self, job: Job, stops: Sequence[str]) -> AsyncIterator[Piece]:
        """Yield the answer's pieces as far as its stops let it go; text that may be the start of a stop waits."""
        held = ""
        async with aclosing(self.worker.pieces(job)) as pieces:
            async for piece in pieces:
                text, held, stopped = cut(held + piece.text, stops)
                if piece.finish and not stopped:
                    text, held = text + held, ""
                yield Piece(piece.token, text, "stop" if stopped else piece.finish)
                if stopped:
                    return

    async def _events(self, jobs: Sequence[Job], head: dict[str, Any], body: Options, chat: bool) -> AsyncIterator[str]:
        """Server-sent events; a client that leaves ends the iteration, and so the job."""
        head["object"] = "chat.completion.chunk" if chat else "text_completion"
        if body.with_usage:
            head["usage"] = None
        count = 0
        try:
            for index, job in enumerate(jobs):
                role = {"role": "assistant"}
                async for piece in self._pieces(job, body.stops):
                    said = {"delta": {**role, "content": piece.text}} if chat else {"text": piece.text}
                    extra = {"token_ids": [piece.token]} if body.return_token_ids else {}
                    choice = {"index": index, **said, "logprobs": None, "finish_reason": piece.finish, **extra}
                    yield event({**head, "choices": [choice]})
                    role, count = {}, count + 1
        except Failed as failed:
            # The status is sent already. No [DONE] follows: the answer is not whole.
            yield event(error_body(500, str(failed)))
            return
        if body.with_usage:
            yield event({**head, "choices": [], "usage": _usage(jobs, count)})
        yield "data: [DONE]\n\n"


def cut(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """Return what of `text` can be said, what must wait as it may begin a stop, and whether a stop was found."""
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], "", True
    beginnings = (size for stop in stops for size in range(1, len(stop)) if text.endswith(stop[:size]))
    keep = len(text) - max(beginnings, default=0)
    return text[:keep], text[keep:], False


def _choice(job: Job, pieces: Sequence[Piece], body: Options, chat: bool) -> dict[str, Any]:
    text = "".join(piece.text for piece in pieces)
    said = {"message": {"role": "assistant", "content": text, "refusal": None}} if chat else {"text": text}
    tokens = [piece.token for piece in pieces]
    extra = {"prompt_token_ids": job.ids, "token_ids": tokens} if body.return_token_ids else {}
    return {**said, "logprobs": None, "finish_reason": pieces[-1].finish, **extra}


def _usage(jobs: Sequence[Job], count: int) -> dict[str, int]:
    asked = sum(len(job.ids) for job in jobs)
    return {"prompt_tokens": asked, "completion_tokens": count, "total_tokens": asked + count}


def event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


async def explain(request: Request, error: Exception) -> Response:
    """Answer every exception in OpenAI's form."""
    if isinstance(error, Refusal):
        return failure(error.status, str(error), param=error.param, code=error.code)
    if isinstance(error, HTTPException):
        return failure(error.status_code, str(error.detail))
    return failure(500, str(error) if isinstance(error, Failed) else "the server has failed: see its log")


def create_app(worker: Worker, name: str, limits: Limits) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.stop)

    app = FastAPI(title="soco-export", lifespan=lifespan, openapi_url=None, default_response_class=JSONResponse)
    app.add_middleware(Door, limits=limits)
    for kind in (Refusal, Failed, HTTPException, Exception):
        app.add_exception_handler(kind, explain)
    api = Api(worker, name)
    app.add_api_route("/health", api.health, response_model=None)
    app.add_api_route("/v1/models", api.models)
    app.add_api_route("/v1/models/{name:path}", api.model)
    app.add_api_route("/v1/completions", api.complete, methods=["POST"], response_model=None)
    app.add_api_route("/v1/chat/completions", api.converse, methods=["POST"], response_model=None)
    return app


class Server(uvicorn.Server):
    """Says where it is once it is there."""

    async def startup(self, sockets: list[Any] | None = None) -> None:
        """Print the address when it can be used."""
        await super().startup(sockets)
        if self.started:
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            print(f"serving at http://{f'[{host}]' if ':' in host else host}:{port}/v1 (Ctrl-C ends it)", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", help="what clients call the model (default: the folder's name)")
    parser.add_argument("--host", default="127.0.0.1", help="default: this machine alone")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free")
    parser.add_argument("--api-key", help=f"the key that clients must send; better in the environment, as {KEY}")
    parser.add_argument("--parallel", type=int, default=4, help="requests that run at once")
    parser.add_argument("--queue", type=int, default=32, help="requests that may wait")
    parser.add_argument("--max-body", type=int, default=1 << 20, help="bytes that a request may have")
    parser.add_argument(
        "--patience", type=float, default=10.0, help="seconds that a client may take to send or to read"
    )
    parser.add_argument("--grace", type=int, default=30, help="seconds that running requests get to finish at the end")
    return parser.parse_args()


def main() -> None:
    given = arguments()
    try:
        worker = Worker(given.folder, given.parallel)
    except (OSError, KeyError, ValueError, RuntimeError) as error:
        raise SystemExit(f"cannot serve {given.folder}: {error}") from None
    places, key = given.parallel + given.queue, given.api_key or os.environ.get(KEY)
    limits = Limits(places, given.max_body, given.patience, key)
    Patient.patience = given.patience
    config = uvicorn.Config(
        create_app(worker, given.name or given.folder.resolve().name, limits),
        given.host,
        given.port,
        http=Patient,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=given.grace,
        log_level="warning",
    )
    Server(config).run()


if __name__ == "__main__":
    main()
