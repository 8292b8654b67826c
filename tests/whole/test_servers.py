"""Servers, started and asked: each gives PyTorch's tokens; the OpenAI server queues, refuses and ends in order.

Everything stays on the loopback interface. What is not installed is skipped with what it would need.
"""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from benchmarks.servers import load, run
from benchmarks.servers.contenders import CONTENDERS, SERVER, Absent, Task
from benchmarks.servers.load import load_test
from benchmarks.servers.process import HOST, free_port, request, serving
from benchmarks.servers.prompts import PROMPTS
from benchmarks.servers.quantised import TOLERANCE, compare
from benchmarks.servers.reference import TIE, Answer, Reference
from benchmarks.servers.triton import repository
from soco_export.onnx.inspect import read_ports
from tests.support import fresh
from tests.support.braked_server import BAD, FATAL, SLOW

pytestmark = pytest.mark.allow_hosts([HOST])

BRAKED = Path(__file__).parents[1] / "support" / "braked_server.py"
SOME = PROMPTS[::6]  # one of them in other scripts
TOKENS = 24


@pytest.fixture(scope="module")
def reference(tiny_run: Path) -> Reference:
    return Reference(tiny_run, SOME, TOKENS)


@contextmanager
def server(folder: Path, *options: str, script: Path = SERVER) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    for module in ("fastapi", "uvicorn", "onnxruntime_genai"):
        pytest.importorskip(module, reason=f"no {module} here: pip install '.[serve]'")
    port = free_port()
    command = [sys.executable, str(script), str(folder), "--port", str(port), *options]
    with serving(command, port, "/health") as process:
        yield port, process


@pytest.fixture(scope="module")
def port(tiny_run: Path) -> Iterator[int]:
    with server(tiny_run / "onnx") as (port, _):
        yield port


@pytest.fixture(scope="module")
def narrow(tiny_run: Path) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Return a server with one place and no queue; the last test that uses it ends it."""
    with server(tiny_run / "onnx", "--parallel", "1", "--queue", "0", script=BRAKED) as found:
        yield found


def post(port: int, path: str = "/v1/completions", **body: Any) -> tuple[int, dict[str, str], Any]:
    return request(port, path, {"prompt": "My fellow citizens", "max_tokens": 4, "temperature": 0, **body})


@contextmanager
def stream(port: int, tokens: int, **body: Any) -> Iterator[HTTPResponse]:
    connection = HTTPConnection(HOST, port, timeout=60)
    asked = {"prompt": "My fellow citizens", "max_tokens": tokens, "temperature": 0, "stream": True, **body}
    connection.request("POST", "/v1/completions", json.dumps(asked), {"Content-Type": "application/json"})
    try:
        yield connection.getresponse()
    finally:
        connection.close()


@contextmanager
def slow(port: int, tokens: int) -> Iterator[HTTPResponse]:
    """Stream an answer that takes its time and has begun, once there is a place: one is freed behind its answer."""
    for _ in range(600):
        with stream(port, tokens, seed=SLOW) as response:
            if response.status == 200:
                response.readline()
                yield response
                return
        time.sleep(0.05)
    pytest.fail("no place was free within half a minute")


def events(response: HTTPResponse) -> list[str]:
    return [line.decode().strip().removeprefix("data: ") for line in response if line.strip()]


@pytest.mark.transformers
@pytest.mark.parametrize("name", CONTENDERS)
def test_a_server_gives_the_tokens_of_torch(name: str, tiny_run: Path, reference: Reference) -> None:
    try:
        answers = CONTENDERS[name](Task(tiny_run / "onnx", SOME, TOKENS))
    except Absent as absent:
        pytest.skip(f"not installed: {absent}")
    verdicts = [reference.judge(number, answer) for number, answer in enumerate(answers)]
    assert [verdict.why for verdict in verdicts] == [""] * len(SOME)
    assert all(verdict.tokens > 0 for verdict in verdicts)


def test_the_command_ends_with_1_when_a_server_differs(
    tiny_run: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    right = [Answer(answer.ids, answer.tokens) for answer in reference.answers]
    wrong = [*right[:-1], Answer(right[-1].ids, [token ^ 1 for token in right[-1].tokens])]
    monkeypatch.setattr(run, "PROMPTS", SOME)
    monkeypatch.setattr(run, "Reference", lambda *arguments: reference)
    said: list[str] = []
    for answers, code in ((right, 0), (wrong, 1)):
        monkeypatch.setitem(CONTENDERS, "one", lambda task, answers=answers: answers)
        arguments = ["--run", str(tiny_run), "--only", "one,two", "--clients", "0", "--json", str(tmp_path / "it.json")]
        monkeypatch.setitem(CONTENDERS, "two", absent)
        assert run.main(arguments, said.append) == code
    assert any("| two | not installed |" in line and "pip install two" in line for line in said)
    assert any(f"one, prompt {len(SOME)}" in line for line in said)
    assert [row["failed"] for row in json.loads((tmp_path / "it.json").read_text())["servers"]] == [True, False]


def absent(task: Task) -> list[Answer]:
    raise Absent("pip install two")


class Logits:
    """A decoder with fixed logits."""

    def __init__(self, logits: np.ndarray) -> None:
        self.found = logits

    def logits(self, ids: np.ndarray) -> np.ndarray:
        return self.found[None, : ids.shape[1]]


@pytest.mark.parametrize("gap", [0.5 * TIE, 2 * TIE])
def test_a_tie_is_reported_and_a_difference_is_one(gap: float) -> None:
    rng = fresh.rng()
    ids, count, step = rng.integers(0, 9, 3).tolist(), 6, int(rng.integers(0, 6))
    logits = rng.normal(size=(len(ids) + count, 9))
    logits[:, 4] = logits.max(-1) + 1  # the greedy token, everywhere
    logits[len(ids) - 1 + step, 7] = logits[len(ids) - 1 + step, 4] - gap
    judge = Reference.__new__(Reference)
    judge.ends, judge.count, judge.decoder = {8}, count, Logits(logits)  # type: ignore[assignment]
    judge.answers = [Answer(ids, [4] * count)]
    other = [4] * count
    other[step] = 7
    assert judge.judge(0, Answer(ids, [4] * count)).gap == 0
    verdict = judge.judge(0, Answer(ids, other))
    assert verdict.gap == pytest.approx(gap)
    assert bool(verdict.why) == (gap > TIE)
    assert judge.judge(0, Answer(ids, [4] * (count - 1))).why
    assert judge.judge(0, Answer([*ids, 1], [4] * count)).why


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_quantised_exports_keep_the_perplexity_of_rounded_torch(weights: Any, tiny_run: Path, tmp_path: Path) -> None:
    found = compare(tiny_run, weights, tmp_path, blocks=2)
    assert abs(found.ratio - 1) < TOLERANCE
    assert found.rounded != found.plain


# The OpenAI server.


def test_a_stream_is_the_same_answer_in_pieces(port: int) -> None:
    whole = post(port, max_tokens=9, return_token_ids=True)[2]["choices"][0]
    with stream(port, 9, return_token_ids=True) as response:
        assert response.getheader("Content-Type", "").startswith("text/event-stream")
        *pieces, done = events(response)
    choices = [json.loads(piece)["choices"][0] for piece in pieces]
    assert done == "[DONE]"
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [token for choice in choices for token in choice["token_ids"]] == whole["token_ids"]
    assert [choice["finish_reason"] for choice in choices] == [None] * 8 + ["length"]


def test_models_and_usage(port: int) -> None:
    assert request(port, "/v1/models")[2]["data"][0]["id"] == "onnx"
    usage = post(port, max_tokens=3)[2]["usage"]
    assert usage["completion_tokens"] == 3
    assert usage["total_tokens"] == usage["prompt_tokens"] + 3


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"n": 2}, "n is not implemented"),
        ({"temperature": -1}, "temperature:"),
        ({"max_tokens": 5000}, "5000"),
        ({"prompt": ""}, "0 tokens"),
    ],
)
def test_what_it_cannot_do_is_refused_by_name(body: dict[str, Any], named: str, port: int) -> None:
    status, _, found = post(port, **body)
    assert status == 400
    assert named in found["error"]["message"]


def test_a_model_without_a_template_does_not_chat(port: int) -> None:
    status, _, found = request(port, "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hello"}]})
    assert status == 400
    assert "chat template" in found["error"]["message"]


def test_a_seed_repeats_a_sample_and_other_seeds_differ(port: int) -> None:
    def sample(seed: int) -> str:
        return str(post(port, max_tokens=24, temperature=1.0, seed=seed)[2]["choices"][0]["text"])

    seeds = [int(seed) for seed in fresh.rng().integers(0, 2**31, 3)]
    texts = [sample(seed) for seed in seeds]
    assert [sample(seed) for seed in seeds] == texts
    assert len(set(texts)) > 1


def test_who_finds_no_place_is_told_when_to_come_again(narrow: tuple[int, Any]) -> None:
    port, _ = narrow
    with slow(port, 900):
        status, headers, found = post(port)
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        assert found["error"]["code"] == "rate_limit_exceeded"
        assert request(port, "/health")[0] == 200


def test_a_client_that_leaves_gives_up_its_place(narrow: tuple[int, Any]) -> None:
    port, _ = narrow
    with slow(port, 900):
        pass
    until = time.monotonic() + 20  # seconds, of the 45 that the answer would take
    while post(port)[0] != 200:
        assert time.monotonic() < until, "the place is still taken"
        time.sleep(0.05)


def test_an_answer_that_nobody_reads_is_not_computed(tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime_genai", reason="no onnxruntime-genai here")
    monkeypatch.syspath_prepend(str(SERVER.parent))
    from worker import Job, Worker

    gone, step = threading.Event(), Worker._step

    def waits(self: Worker, job: Job) -> bool:
        if job is left and job.max_tokens < 900:  # the second token comes when nobody reads any more
            gone.wait(60)
        return step(self, job)

    monkeypatch.setattr(Worker, "_step", waits)
    worker = Worker(tiny_run / "onnx", parallel=1)
    worker.start()
    left, after = (Job(worker.encode(SOME[0]), count, 0.0, 1.0, None) for count in (900, 3))

    async def both() -> int:
        first = worker.pieces(left)
        await anext(first)
        await first.aclose()
        gone.set()
        return len([piece async for piece in worker.pieces(after)])

    assert asyncio.run(both()) == 3
    assert left.max_tokens >= 898
    worker.stop()


@pytest.fixture
def unlucky(tiny_run: Path) -> Iterator[int]:
    with server(tiny_run / "onnx", script=BRAKED) as (port, _):
        yield port


def test_a_request_that_fails_spoils_no_other_and_a_dead_thread_is_not_healthy(unlucky: int) -> None:
    right = post(unlucky)[2]["choices"][0]["text"]
    status, _, found = post(unlucky, seed=BAD)
    assert (status, found["error"]["type"]) == (500, "server_error")
    assert "bad luck" in found["error"]["message"]
    with stream(unlucky, 9, seed=BAD) as response:
        *pieces, last = (json.loads(event) for event in events(response))
    assert len(pieces) == 2
    assert "bad luck" in last["error"]["message"]
    assert request(unlucky, "/health")[0] == 200
    assert post(unlucky)[2]["choices"][0]["text"] == right

    with slow(unlucky, 900) as other:  # shares the thread with the one that ends it
        assert post(unlucky, seed=FATAL)[0] == 500
        assert "error" in json.loads(events(other)[-1])
    assert request(unlucky, "/health")[0] == 503
    assert post(unlucky)[0] == 503


def test_sigterm_lets_an_answer_finish(narrow: tuple[int, Any]) -> None:
    port, process = narrow
    with slow(port, 20) as response:
        process.send_signal(signal.SIGTERM)
        *pieces, done = events(response)
    assert done == "[DONE]"
    assert json.loads(pieces[-1])["choices"][0]["finish_reason"] in ("length", "stop")
    assert process.wait(60) in (0, -signal.SIGTERM)


def test_sixteen_clients_without_an_error(tiny_run: Path, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def crowded(command: list[str], port: int, ready: str) -> Any:
        """In the crowd nobody is answered before somebody has been turned away, however fast the server is."""
        until = ["--until-full"] if command[-1] != "16" else []
        return serving([command[0], str(BRAKED), *command[2:], *until], port, ready)

    monkeypatch.setattr(load, "serving", crowded)
    room, crowd = load_test(tiny_run / "onnx", clients=16, requests=1, tokens=8, prompts=PROMPTS)
    assert room.errors == crowd.errors == []
    assert len(room.whole) == len(crowd.whole) == 16
    assert room.turned_away == 0 < crowd.turned_away


# Triton: its configuration by the schema, its Python model against an imitation of the module that Triton brings.


@pytest.fixture(scope="module")
def models(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return repository(tiny_run / "onnx", tmp_path_factory.mktemp("triton") / "onnx")


def schema() -> Callable[[], Any]:
    """Return the part of Triton's ModelConfig that the layout uses, its own where tritonclient is installed."""
    try:
        from tritonclient.grpc import model_config_pb2

        return model_config_pb2.ModelConfig  # type: ignore[no-any-return]
    except ImportError:
        file = descriptor_pb2.FileDescriptorProto(name="part.proto", package="inference", syntax="proto3")
        text_format.Parse(PART_OF_MODEL_CONFIG, file)
        pool = descriptor_pool.DescriptorPool()
        pool.Add(file)
        return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))


def part_field(name: str, number: int, kind: str, label: str = "OPTIONAL", of: str = "") -> str:
    of = f'type_name: ".inference.{of}"' if of else ""
    return f'field {{ name: "{name}" number: {number} type: TYPE_{kind} label: LABEL_{label} {of} }}'


# Names, numbers and types of model_config.proto, as published with Triton's client.
TENSOR = part_field("name", 1, "STRING") + part_field("data_type", 2, "ENUM", of="DataType")
PART_OF_MODEL_CONFIG = f"""
enum_type {{ name: "DataType" value {{ name: "TYPE_INVALID" number: 0 }} value {{ name: "TYPE_INT32" number: 8 }}
  value {{ name: "TYPE_INT64" number: 9 }} value {{ name: "TYPE_FP16" number: 10 }}
  value {{ name: "TYPE_FP32" number: 11 }}
  value {{ name: "TYPE_STRING" number: 13 }} value {{ name: "TYPE_BF16" number: 14 }} }}
message_type {{ name: "ModelInput" {TENSOR} {part_field("dims", 4, "INT64", "REPEATED")} }}
message_type {{ name: "ModelOutput" {TENSOR} {part_field("dims", 3, "INT64", "REPEATED")} }}
message_type {{ name: "ModelParameter" {part_field("string_value", 1, "STRING")} }}
message_type {{ name: "ModelConfig" {part_field("name", 1, "STRING")} {part_field("max_batch_size", 4, "INT32")}
  {part_field("input", 5, "MESSAGE", "REPEATED", "ModelInput")}
  {part_field("output", 6, "MESSAGE", "REPEATED", "ModelOutput")}
  {part_field("parameters", 14, "MESSAGE", "REPEATED", "ModelConfig.ParametersEntry")}
  {part_field("backend", 17, "STRING")}
  nested_type {{ name: "ParametersEntry" options {{ map_entry: true }} {part_field("key", 1, "STRING")}
    {part_field("value", 2, "MESSAGE", of="ModelParameter")} }} }}
"""


def test_the_configurations_are_tritons(models: Path, tiny_run: Path) -> None:
    names = {}
    for model in ("decoder", "generate"):
        text = (models / model / "config.pbtxt").read_text(encoding="utf-8")
        names[model] = text_format.Parse(text, schema()())
        assert names[model].name == model
    ports, decoder = read_ports(tiny_run / "onnx"), names["decoder"]
    assert [port.name for port in decoder.input] == list(ports.inputs)
    assert [port.name for port in decoder.output] == list(ports.outputs)
    cache = next(port for port in decoder.input if port.name == "past_key_values.0.key")
    assert list(cache.dims) == [-1, ports.kv_heads, -1, ports.head_dim]
    form = json.loads(names["generate"].parameters["decoder"].string_value)
    assert list(form["empty"]) == [name for name in ports.inputs if name.startswith("past_key_values")]
    assert list(form["empty"].values()) == [[1, ports.kv_heads, 0, ports.head_dim]] * 2 * ports.layers


def imitation(session: Any) -> ModuleType:
    """Return a module like triton_python_backend_utils, whose `decoder` is the graph."""

    class Tensor(SimpleNamespace):
        def __init__(self, name: str, value: np.ndarray) -> None:
            super().__init__(name=name, value=value, as_numpy=lambda: value)

    def execute(asked: SimpleNamespace) -> SimpleNamespace:
        assert asked.model_name == "decoder"
        feeds = {tensor.name: tensor.value for tensor in asked.inputs}
        found = session.run(asked.requested_output_names, feeds)
        tensors = [Tensor(*pair) for pair in zip(asked.requested_output_names, found, strict=True)]
        return SimpleNamespace(tensors=tensors, has_error=lambda: False)

    module: Any = ModuleType("triton_python_backend_utils")
    module.Tensor = Tensor
    module.TritonModelException, module.TritonError = RuntimeError, str
    module.TRITONSERVER_MEMORY_CPU, module.PreferredMemory = 0, lambda *place: place
    module.triton_string_to_numpy = {"TYPE_FP32": np.float32}.__getitem__
    module.InferenceResponse = lambda tensors=(), error=None: error or {one.name: one.value for one in tensors}
    module.get_input_tensor_by_name = lambda given, name: given[name]
    module.get_output_tensor_by_name = lambda given, name: next(one for one in given.tensors if one.name == name)

    class InferenceRequest(SimpleNamespace):
        def exec(self) -> SimpleNamespace:
            return execute(self)

    module.InferenceRequest = InferenceRequest
    return module  # type: ignore[no-any-return]


@pytest.fixture
def triton_answers(models: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[bytes]], list[Any]]:
    """Return what Triton does with texts: one call of the model `generate` for all of them."""
    session = onnxruntime.InferenceSession(str(tiny_run / "onnx" / "model.onnx"), providers=["CPUExecutionProvider"])
    module = imitation(session)
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", module)
    names: dict[str, Any] = {"__file__": str(models / "generate" / "1" / "model.py")}
    exec((models / "generate" / "1" / "model.py").read_text(encoding="utf-8"), names)
    config = text_format.Parse((models / "generate" / "config.pbtxt").read_text(encoding="utf-8"), schema()())
    parameters = {"decoder": {"string_value": config.parameters["decoder"].string_value}}
    model = names["TritonPythonModel"]()
    model.initialize({"model_config": json.dumps({"parameters": parameters})})

    def answers(texts: list[bytes]) -> list[Any]:
        count = module.Tensor("", np.array([TOKENS]))
        inputs = [module.Tensor("", np.array([text], object)) for text in texts]
        return list(model.execute([{"text_input": text, "max_tokens": count} for text in inputs]))

    return answers


def test_the_triton_model_gives_the_tokens_of_torch(triton_answers: Any, reference: Reference) -> None:
    for number, found in enumerate(triton_answers([text.encode() for text in SOME])):
        answer = Answer(found["prompt_token_ids"].tolist(), found["token_ids"].tolist())
        assert reference.judge(number, answer).why == ""
        assert found["text_output"][0].decode() == reference.tokenizer.decode(answer.tokens, skip_special_tokens=True)


@pytest.mark.parametrize(("text", "said"), [(b"", "no token"), (b"\xff", "utf-8")])
def test_a_text_that_triton_cannot_begin_with_spoils_no_other(text: bytes, said: str, triton_answers: Any) -> None:
    before, failed, after = triton_answers([SOME[0].encode(), text, SOME[0].encode()])
    assert said in failed
    assert before["token_ids"].tolist() == after["token_ids"].tolist() != []
