"""The thread that owns the model: it gives every running request one token in turn.

onnxruntime-genai keeps Python's lock while it computes a token, so a second thread would win nothing; taking turns is
fair, needs no batching, and is right for both flavours. (genai's own Engine batches: docs/serving.md says when it is
right.)
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime_genai as genai

SEEDS = 2**31  # genai's seeds have 31 bits; larger ones, and negative ones, are folded into them
CHARACTERS_PER_TOKEN = 64  # no prompt needs more: what is longer is refused before it is tokenised, under Python's lock


class Failed(Exception):
    """This request gets no answer, or no more of it."""


class Piece(NamedTuple):
    """One token: its text as far as it is whole characters, and why the answer ends with it ("stop", "length")."""

    token: int
    text: str
    finish: str | None


@dataclass
class Job:
    """One request. `cancelled` may be set at any time; `send` hands a Piece, or an exception, to who waits."""

    ids: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    cancelled: bool = False
    send: Any = None
    generator: Any = field(default=None, repr=False)
    stream: Any = field(default=None, repr=False)


class Worker(threading.Thread):
    """Runs at most `parallel` jobs at once, the rest in the order of their arrival."""

    def __init__(self, folder: Path, parallel: int) -> None:
        super().__init__(name="model", daemon=True)
        self.model = genai.Model(str(folder))
        self.tokenizer = genai.Tokenizer(self.model)
        config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]
        end = config.get("eos_token_id", [])
        self.vocabulary = int(config["vocab_size"])
        self.context, self.ends = int(config["context_length"]), set(end if isinstance(end, list) else [end])
        tokenizer_config = (folder / "tokenizer_config.json").read_text(encoding="utf-8")
        self.chats = (folder / "chat_template.jinja").exists() or "chat_template" in json.loads(tokenizer_config)
        self.parallel = parallel
        self.inbox: queue.Queue[Job | None] = queue.Queue()

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a prompt; ValueError if there is no room for them."""
        if len(text) > CHARACTERS_PER_TOKEN * self.context:
            raise ValueError(f"{len(text)} characters: there is room for {self.context} tokens")
        return [int(token) for token in self.tokenizer.encode(text)]

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant speaks; ValueError if its template refuses."""
        size = sum(len(message["content"]) for message in messages)
        if max(len(messages), size // CHARACTERS_PER_TOKEN) > self.context:  # before a template goes through them
            raise ValueError(f"{len(messages)} messages of {size} characters: there is room for {self.context} tokens")
        try:
            text = self.tokenizer.apply_chat_template(json.dumps(messages), add_generation_prompt=True)
        except RuntimeError as error:
            raise ValueError(f"the model's chat template refuses the messages: {error}") from None
        return self.encode(text)

    async def pieces(self, job: Job) -> AsyncIterator[Piece]:
        """Yield the job's answer token by token, or raise Failed; leaving the loop early cancels it."""
        loop, box = asyncio.get_running_loop(), asyncio.Queue[Piece | Exception]()
        job.send = lambda found: loop.call_soon_threadsafe(box.put_nowait, found)
        self.inbox.put(job)
        try:
            while True:
                found = await box.get()
                if isinstance(found, Exception):
                    raise Failed(f"{type(found).__name__}: {found}") from found
                yield found
                if found.finish:
                    return
        finally:
            job.cancelled = True

    def stop(self) -> None:
        """End the thread; running jobs go no further."""
        self.inbox.put(None)
        self.join()

    def run(self) -> None:
        """One token for each running job, then the next round."""
        running: list[Job] = []
        try:
            while self._admit(running):
                running[:] = [job for job in running if self._goes_on(job)]
                time.sleep(0)  # the event loop must have Python's lock too, or it delivers in lumps
        finally:
            self._turn_away(running)

    def _admit(self, running: list[Job]) -> bool:
        """Let jobs in where there are places, waiting if none runs; say whether to go on."""
        while len(running) < self.parallel and (not running or not self.inbox.empty()):
            job = self.inbox.get()
            if job is None:
                return False
            running.append(job)
        return True

    def _turn_away(self, running: list[Job]) -> None:
        """Tell those who still wait that the thread is at its end, or they would wait for ever."""
        waiting: list[Job | None] = [*running]
        while not self.inbox.empty():
            waiting.append(self.inbox.get())
        for job in waiting:
            if job is not None and not job.cancelled:
                job.send(RuntimeError("the model's thread has ended"))

    def _goes_on(self, job: Job) -> bool:
        """Compute the job's next token and say whether another one follows."""
        if job.cancelled:
            return False
        try:
            return self._step(job)
        # Whatever it is, it belongs to this request: the others share the thread, which must go on for them.
        except Exception as error:
            logging.getLogger(__name__).exception("a request failed")
            job.send(error)
            return False

    def _step(self, job: Job) -> bool:
        if job.generator is None:
            self._begin(job)
        job.generator.generate_next_token()
        job.max_tokens -= 1
        token = int(job.generator.get_next_tokens()[0])
        finish = "stop" if token in self.ends else "length" if job.max_tokens == 0 else None
        job.send(Piece(token, "" if finish == "stop" else job.stream.decode(token), finish))
        return finish is None

    def _begin(self, job: Job) -> None:
        settings = genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=len(job.ids) + job.max_tokens, do_sample=job.temperature > 0)
        if job.temperature > 0:
            # genai's own default is the 50 likeliest tokens; the API that is served here knows no such bound.
            settings.set_search_options(temperature=job.temperature, top_p=job.top_p, top_k=0)
        if job.seed is not None:
            settings.set_search_options(random_seed=job.seed % SEEDS)
        job.generator, job.stream = genai.Generator(self.model, settings), self.tokenizer.create_stream()
        job.generator.append_tokens(job.ids)
