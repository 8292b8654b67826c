"""What a request may say, by OpenAI's reference: read with bounds, refused by name where it asks for what is not here.

What is not implemented is accepted when it asks for the default, because clients send defaults (`n=1`, `stop=null`,
`tools=[]`), and is refused otherwise: an answer is never one that the request did not ask for.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

MOST_PROMPTS, MOST_STOPS = 64, 4  # four stops is OpenAI's own bound
LONGEST_STOP = 256  # characters: each token's text is held against every beginning of a stop
MOST_FIELDS = 100  # of a request or a message: some three times as many as there are
LONGEST_ANSWER = 300  # characters of what a refusal says: names of fields are the client's
# Parameters of both endpoints that are not implemented, and the values that ask for nothing.
NOTHING: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (False, True),  # says something only where there are tools
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "metadata": ({},),
}
# The same for a message: an answer of the official client, sent back as it came, has all of them.
NOTHING_IN_A_MESSAGE: dict[str, tuple[Any, ...]] = {
    "refusal": ("",),
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "tool_calls": ([],),
}


class Refusal(Exception):
    """The request is answered with this status and OpenAI's error object."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code


def _whole(text: str) -> str:
    """Refuse NUL, at which the tokenizer would stop reading; halves of surrogate pairs are refused by the parser."""
    if "\0" in text:
        raise ValueError("the text holds a NUL character")
    return text


# A list ends at its first fault: a body of 1 MB has half a million, which took seconds and 500 MB.
Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[str, Field(max_length=LONGEST_STOP), AfterValidator(_whole)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1, fail_fast=True)]


class Body(BaseModel):
    """Unknown fields are an error, NaN and infinity too."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


def drop_defaults(values: Any, known: dict[str, tuple[Any, ...]]) -> Any:
    """Return `values` without the fields of `known` that ask for nothing; ValueError for one that asks for more."""
    if not isinstance(values, dict):
        return values
    if len(values) > MOST_FIELDS:
        raise ValueError(f"{len(values)} fields")
    for name in known.keys() & values.keys():
        value = values[name]
        if value is not None and not any(type(value) is type(default) and value == default for default in known[name]):
            raise ValueError(f"{name} is not implemented: leave it out")
    return {name: value for name, value in values.items() if name not in known}


class StreamOptions(Body):
    """`include_usage`: one more event before the end, with the numbers of tokens."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class Options(Body):
    """What both endpoints take."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None  # names of clients and their caches: no answer depends on them
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    return_token_ids: bool = False  # as in vLLM: the ids, of the prompt and of the answer

    @model_validator(mode="before")
    @classmethod
    def _only_defaults(cls, values: Any) -> Any:
        return drop_defaults(values, NOTHING)

    @model_validator(mode="after")
    def _consistent(self) -> Options:
        if self.stream_options and not self.stream:
            raise ValueError("stream_options needs stream: true")
        return self

    @property
    def stops(self) -> list[str]:
        """The texts that end the answer."""
        return [stop for stop in ([self.stop] if isinstance(self.stop, str) else self.stop or []) if stop]

    @property
    def with_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)


class Completion(Options):
    """The body of /v1/completions: one prompt or several, as text or as token ids."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
        | Tokens
        | Annotated[list[Tokens], Field(min_length=1, max_length=MOST_PROMPTS, fail_fast=True)]
    )

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each of which gets a choice."""
        several = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        return list(self.prompt) if several else [self.prompt]  # type: ignore[arg-type, list-item]


class Part(Body):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(fail_fast=True)]
    name: Text | None = None

    @model_validator(mode="before")
    @classmethod
    def _only_defaults(cls, values: Any) -> Any:
        return drop_defaults(values, NOTHING_IN_A_MESSAGE)

    def turn(self) -> dict[str, str]:
        """Return it as chat templates have it; developer is OpenAI's newer word for system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": text} | ({"name": self.name} if self.name else {})


class Chat(Options):
    """The body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    max_completion_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_limit(self) -> Chat:
        given = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(given) > 1:
            raise ValueError("max_tokens and max_completion_tokens differ: give one")
        self.max_tokens = next(iter(given), None)
        return self


Kind = TypeVar("Kind", bound=Options)


def read_body(kind: type[Kind], raw: bytes) -> Kind:
    """Return the request's body; Refusal (400) with the field for what it must not hold.

    Of a field that may be of several types, the fault of the one that came furthest is told.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False, include_input=False)
        body = _parsed(raw)
        first = max(faults, key=lambda fault: len(_named(fault["loc"], body)))
        absent = first["loc"][-1:] if first["type"] == "missing" else ()
        place = ".".join(map(str, (*_named(first["loc"], body), *absent)))
        said = first["msg"].removeprefix("Value error, ")
        message = (f"{place}: {said}" if place else said)[:LONGEST_ANSWER]
        raise Refusal(400, message, param=place[:LONGEST_ANSWER] or None) from None


def _parsed(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _named(loc: Sequence[str | int], value: Any) -> list[str | int]:
    """Return the steps of a fault's place that lead through `value`; the others name types that a field may be of."""
    found: list[str | int] = []
    for part in loc:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and part in range(len(value))):
            value = value[part]  # type: ignore[index, call-overload]
            found.append(part)
    return found
