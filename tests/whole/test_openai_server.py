"""The example server as OpenAI's own client uses it, and as a client uses it that means no good."""

from __future__ import annotations

import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from benchmarks.servers.contenders import SERVER
from benchmarks.servers.process import HOST, free_port, request, serving
from benchmarks.servers.soak import soak
from tests.support.braked_server import SLOW, WATCHED

pytestmark = pytest.mark.allow_hosts([HOST])
BRAKED = Path(__file__).parents[1] / "support" / "braked_server.py"
TEMPLATE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}assistant:"
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = "My fellow citizens"
HELLO = [{"role": "user", "content": "Hello"}]


@contextmanager
def server(folder: Path, *options: str) -> Iterator[int]:
    for module in ("fastapi", "uvicorn", "onnxruntime_genai"):
        pytest.importorskip(module, reason=f"no {module} here: pip install 'soco-export[serve]'")
    port = free_port()
    with serving([sys.executable, str(BRAKED), str(folder), "--port", str(port), *options], port, "/health"):
        yield port


@pytest.fixture(scope="module")
def folder(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    shutil.copytree(tiny_run / "onnx", folder, ignore=shutil.ignore_patterns("triton"))
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    with server(folder, "--patience", "4", "--parallel", "2", "--queue", "6", "--max-body", "100000") as port:
        yield port


@pytest.fixture
def client(port: int) -> Any:
    openai = pytest.importorskip("openai", reason="no openai here: pip install openai")
    return openai.OpenAI(base_url=f"http://{HOST}:{port}/v1", api_key="none", max_retries=0)


def post(port: int, path: str, body: Any, **headers: str) -> tuple[int, Any]:
    """Return status and JSON; a str or bytes body goes as it is."""
    connection = HTTPConnection(HOST, port, timeout=60)
    raw = body if isinstance(body, str | bytes) else json.dumps(body)
    try:
        connection.request("POST", path, raw, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ["a"] * 1000},
        {"prompt": [[]] * 1000},
        {"prompt": [["a"] * 1000]},
        {"messages": [{}] * 1000},
        {"messages": [{"role": "user", "content": [1] * 1000}]},
        {"prompt": "a", "stop": [1] * 1000},
        {"prompt": "a", **{f"field{number}": 1 for number in range(1000)}},
    ],
    ids=lambda body: str(body)[:40],
)
def test_a_body_of_faults_is_read_to_the_first(body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a million of them, in 1 MB, took 5 s of the event loop and 700 MB."""
    monkeypatch.syspath_prepend(SERVER.parent)
    from bodies import Chat, Completion

    with pytest.raises(ValidationError) as raised:
        (Chat if "messages" in body else Completion).model_validate_json(json.dumps(body))
    assert raised.value.error_count() < 20


# What the official client sends.


def test_the_official_client_chats(client: Any) -> None:
    plain = client.chat.completions.create(
        model="tiny", messages=HELLO, n=1, stop=None, max_completion_tokens=6, seed=2**63 + 5, frequency_penalty=0
    )
    assert plain.usage.completion_tokens == len(plain.choices) * 6 or plain.choices[0].finish_reason == "stop"
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    same = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": parts}], max_tokens=6, seed=2**63 + 5
    )
    assert same.choices[0].message.content == plain.choices[0].message.content
    again = [*HELLO, plain.choices[0].message.model_dump(), {"role": "user", "content": "And?"}]
    assert client.chat.completions.create(model="tiny", messages=again, max_tokens=2).choices


def test_the_official_client_streams_with_usage(client: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 7, "temperature": 0}
    whole = client.chat.completions.create(**settings)
    chunks = list(client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}))
    *pieces, last = chunks
    assert last.choices == []
    assert last.usage == whole.usage
    assert all(piece.usage is None for piece in pieces)
    assert "".join(piece.choices[0].delta.content for piece in pieces) == whole.choices[0].message.content
    assert [piece.choices[0].delta.role for piece in pieces] == ["assistant"] + [None] * (len(pieces) - 1)
    assert pieces[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_the_official_client_completes_lists_and_finds_models(client: Any) -> None:
    import openai

    two = client.completions.create(model="tiny", prompt=[PROMPT, "The state of"], temperature=0, echo=False, best_of=1)
    alone = client.completions.create(model="tiny", prompt="The state of", temperature=0)
    assert [choice.index for choice in two.choices] == [0, 1]
    assert two.choices[1].text == alone.choices[0].text
    ids = client.completions.create(
        model="tiny", prompt="The state of", temperature=0, extra_body={"return_token_ids": True}
    )
    same = client.completions.create(model="tiny", prompt=ids.choices[0].prompt_token_ids, temperature=0)
    assert same.choices[0].text == alone.choices[0].text
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4o")
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt-4o", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError, match="tools is not implemented") as refused:
        client.chat.completions.create(model="tiny", messages=HELLO, tools=[{"type": "function"}])
    assert refused.value.type == "invalid_request_error"


# The bodies as they come over the wire, for where the client is not installed.

DEFAULTS: dict[str, Any] = {
    "model": "tiny",
    "n": 1,
    "stop": None,
    "stream": False,
    "stream_options": None,
    "temperature": None,
    "top_p": None,
    "max_tokens": 3,
    "frequency_penalty": 0,
    "presence_penalty": 0.0,
    "logit_bias": {},
    "logprobs": None,
    "seed": -(10**30),
    "user": "me",
}


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_defaults_are_accepted(path: str, port: int) -> None:
    only_chat: dict[str, Any] = {
        "messages": HELLO,
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "max_completion_tokens": 3,
        "top_logprobs": None,
        "service_tier": "auto",
        "store": False,
        "metadata": None,
    }
    body = DEFAULTS | (only_chat if path == CHAT else {"prompt": PROMPT, "suffix": None, "echo": False, "best_of": 1})
    status, found = post(port, path, body)
    assert status == 200, found
    assert found["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"logprobs": 0}, "logprobs"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": "a" * 1000}, "stop"),
        ({"k" * 50_000: 1}, ""),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_k": 3}, "top_k"),
        ({"\ud800": 3}, ""),
        ({"temperature": float("nan")}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["x", 3]}, "prompt"),
        ({"prompt": [10**9]}, "1000000000"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 65}, "prompt"),
        ({"prompt": "a\ud800b"}, ""),
        ({"prompt": "a\0b"}, "NUL"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a " * 40000}, "room"),
        ({"seed": 1.5}, "seed"),
        ({"model": 3}, "model"),
        ({"prompt": 5}, "prompt: "),  # and not the names of the types that a prompt may be of
        ({"prompt": [[1, "a"]]}, "prompt.0"),
        ({"stop": [1]}, "stop"),
    ],
)
def test_what_is_not_implemented_or_no_value_is_refused_by_name(body: dict[str, Any], named: str, port: int) -> None:
    status, found = post(port, TEXT, {"prompt": PROMPT, "max_tokens": 2, **body})
    assert (status, found["error"]["type"]) == (400, "invalid_request_error")
    assert named in found["error"]["message"]
    assert len(found["error"]["message"]) < 500
    assert set(found["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 50_000, b'{"prompt": ' + b"9" * 9000 + b"}", b'{"prompt": "a'],
)
def test_what_is_no_json_is_refused(raw: bytes, port: int) -> None:
    for path in (TEXT, CHAT):
        assert post(port, path, raw)[0] == 400


@pytest.mark.parametrize(
    "messages",
    [
        [],
        [{"role": "tool", "content": "x"}],
        [{"role": "user"}],
        [{"role": "user", "content": [{"type": "image_url"}]}],
    ],
)
def test_messages_that_cannot_be_answered_are_refused(messages: Any, port: int) -> None:
    status, found = post(port, CHAT, {"messages": messages})
    assert status == 400
    assert "messages" in found["error"]["message"]


def test_a_stop_ends_the_answer_before_it(port: int) -> None:
    body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 40}
    whole = post(port, TEXT, body)[1]["choices"][0]["text"]
    at = random.randrange(3, len(whole) - 6)
    stop = whole[at : at + 5]
    before = whole[: whole.index(stop)]
    for stops in (stop, ["never this", stop]):
        choice = post(port, TEXT, {**body, "stop": stops})[1]["choices"][0]
        assert (choice["text"], choice["finish_reason"]) == (before, "stop")
    assert post(port, TEXT, {**body, "stop": whole + "?"})[1]["choices"][0]["text"] == whole


def test_unknown_paths_and_methods_are_answered_in_the_same_form(port: int) -> None:
    for path, status in (("/v1/nothing", 404), ("/v1/models/x", 404), ("/", 404), (TEXT, 405)):
        found = request(port, path)
        assert found[0] == status
        assert found[2]["error"]["type"] == "invalid_request_error"


# Clients that mean no good.


def test_a_body_is_refused_before_it_is_read(port: int) -> None:
    with socket.create_connection((HOST, port)) as line:
        line.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: {10**9}\r\n\r\n".encode())
        assert b" 413 " in line.recv(1000)
    status, found = post(port, TEXT, b"x" * 3_000_000)  # is sent whole, and answered all the same
    assert (status, found["error"]["code"]) == (413, "request_too_large")
    with socket.create_connection((HOST, port)) as line:  # no length given
        line.sendall(f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        line.sendall((b"4000\r\n" + b"x" * 0x4000 + b"\r\n") * 10)
        assert b" 413 " in line.recv(1000)


def test_clients_that_never_finish_hold_no_place_and_are_dropped(port: int) -> None:
    begun = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{"
    lines = [socket.create_connection((HOST, port)) for _ in range(24)]
    for number, line in enumerate(lines):
        line.sendall((begun, "POST", "")[number % 3].encode())
    assert post(port, TEXT, {"prompt": PROMPT, "max_tokens": 2})[0] == 200  # there are 8 places
    for number, line in enumerate(lines):
        line.settimeout(60)
        said = b""
        with line, suppress(ConnectionResetError):
            while found := line.recv(1000):
                said += found
        assert (b" 408 " in said) == (number % 3 == 0)


def test_a_client_that_leaves_while_it_waits_gives_up_its_place(port: int) -> None:
    asked = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "seed": SLOW, "stream": True}
    body = json.dumps(asked).encode()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with ExitStack() as clients:
        for _ in range(8):
            line = clients.enter_context(socket.create_connection((HOST, port), timeout=60))
            line.sendall(head.encode() + body)
            assert b" 200 " in line.recv(100)  # it has a place: two are answered, six wait
        assert post(port, TEXT, {"prompt": PROMPT, "max_tokens": 1})[0] == 429
    until = time.monotonic() + 30  # seconds, of the minutes that the answers would take
    while post(port, TEXT, {"prompt": PROMPT, "max_tokens": 1})[0] == 429:
        assert time.monotonic() < until, "places of clients that have left are still taken"


def test_health_answers_while_a_text_is_tokenised(port: int) -> None:
    """The text is tokenised only when health has been answered meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(post, port, TEXT, {"prompt": WATCHED + PROMPT, "max_tokens": 1})
        while not job.done():
            assert request(port, "/health")[0] == 200
    status, found = job.result()
    assert status == 200, found


def test_a_key_is_asked_for_everything_but_health(folder: Path) -> None:
    with server(folder, "--api-key", "gehéim", "--name", "a/model") as port:
        assert request(port, "/health")[0] == 200
        assert request(port, "/v1/models")[2]["error"]["code"] == "invalid_api_key"
        body = {"prompt": PROMPT, "max_tokens": 1, "model": "a/model"}
        assert post(port, TEXT, body)[0] == post(port, TEXT, body, Authorization="Bearer wrong")[0] == 401
        assert post(port, TEXT, body, Authorization="Bearer gehéim".encode().decode("latin-1"))[0] == 200


def test_it_says_where_it_is_and_why_it_cannot_be(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fastapi", reason="no fastapi here")
    command = [sys.executable, str(SERVER), str(folder), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        said = process.stdout.readline()
        assert f"http://{HOST}:" in said  # loopback, where nothing else is asked for
        port = int(said.split(f"{HOST}:")[1].split("/")[0])
        assert request(port, "/health")[0] == 200
        process.terminate()
    done = subprocess.run([*command[:2], str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "cannot serve" in done.stderr
    assert "Traceback" not in done.stderr


def test_64_clients_some_of_whom_leave(folder: Path) -> None:
    """A crowd for some seconds: who stays gets the right answer, and in the end every place is free."""
    for module in ("fastapi", "uvicorn", "onnxruntime_genai"):
        pytest.importorskip(module, reason=f"no {module} here: pip install 'soco-export[serve]'")
    found = soak(folder, clients=64, seconds=3)
    assert not found.errors
    assert found.free_again
    assert found.answers > 0
    assert found.left > 0
