"""Each server by name: start it, send the prompts, return its token ids; or Absent, with what it would need.

The examples are run as they stand, in processes of their own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from benchmarks.servers import triton
from benchmarks.servers.process import free_port, request, serving
from benchmarks.servers.reference import Answer

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
SERVER = EXAMPLES / "serve_openai" / "server.py"


class Absent(Exception):
    """This server is not installed here; the message says what to do about it."""


@dataclass(frozen=True)
class Task:
    """What every server is given. `optimum`: a Python that has optimum; `triton`: where nvidia-pytriton lies."""

    folder: Path
    prompts: Sequence[str]
    tokens: int
    optimum: Path = ROOT / ".venv-optimum" / "bin" / "python"
    triton: Path = ROOT / ".venv-triton"


Contender = Callable[[Task], list[Answer]]
CONTENDERS: dict[str, Contender] = {}


def contender(name: str) -> Callable[[Contender], Contender]:
    """Register a server under the name that the table shows."""

    def register(function: Contender) -> Contender:
        CONTENDERS[name] = function
        return function

    return register


@contender("onnxruntime")
def onnxruntime(task: Task) -> list[Answer]:
    """ONNX Runtime from Python, with the generation loop of the example."""
    return _script([sys.executable, EXAMPLES / "onnxruntime_generate.py"], task)


@contender("onnxruntime-genai")
def genai(task: Task) -> list[Answer]:
    """The loop, the search and the tokenizer of onnxruntime-genai."""
    _needs("onnxruntime_genai", "pip install '.[genai]'")
    return _script([sys.executable, EXAMPLES / "genai_generate.py"], task)


@contender("optimum")
def optimum(task: Task) -> list[Answer]:
    """ORTModelForCausalLM and transformers' generate, usually in an environment of their own."""
    python = Path(sys.executable) if find_spec("optimum") else task.optimum
    if not python.exists():
        raise Absent("make setup-optimum, or --optimum PYTHON of an environment with soco-export[optimum]")
    return _script([python, EXAMPLES / "optimum_generate.py"], task)


@contender("onnxruntime-node")
def node(task: Task) -> list[Answer]:
    """Another language: JavaScript, with its own ONNX Runtime and its own tokenizer."""
    if shutil.which("node") is None:
        raise Absent("Node.js 20 or later")
    if not (EXAMPLES / "node" / "node_modules" / "onnxruntime-node").exists():
        raise Absent("npm install --prefix examples/node --ignore-scripts")
    return _script(["node", EXAMPLES / "node" / "generate.mjs"], task)


@contender("OpenAI server")
def openai(task: Task) -> list[Answer]:
    """The FastAPI example over HTTP."""
    for module in ("fastapi", "uvicorn", "onnxruntime_genai"):
        _needs(module, "pip install '.[serve]'")
    port = free_port()
    with serving([sys.executable, str(SERVER), str(task.folder), "--port", str(port)], port, "/health"):
        return [_complete(port, prompt, task.tokens) for prompt in task.prompts]


@contender("Triton")
def tritonserver(task: Task) -> list[Answer]:
    """A real tritonserver over HTTP, its ONNX Runtime backend replaced by a stand-in (benchmarks.servers.triton)."""
    if not triton.installed(task.triton):
        raise Absent(f"{triton.INSTALL} (or --triton FOLDER)")
    with tempfile.TemporaryDirectory() as scratch:
        port = free_port()
        with serving(triton.command(task.folder, task.triton, Path(scratch), port), port, "/v2/health/ready"):
            return [_generate(port, prompt, task.tokens) for prompt in task.prompts]


def _complete(port: int, prompt: str, tokens: int) -> Answer:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    status, _, found = request(port, "/v1/completions", body)
    if status != 200:
        raise RuntimeError(f"{status}: {found}")
    return Answer(found["choices"][0]["prompt_token_ids"], found["choices"][0]["token_ids"])


def _generate(port: int, prompt: str, tokens: int) -> Answer:
    status, _, found = request(port, "/v2/models/generate/generate", {"text_input": prompt, "max_tokens": tokens})
    if status != 200:
        raise RuntimeError(f"{status}: {found}")
    ids, after = (found[name] for name in ("prompt_token_ids", "token_ids"))
    # Triton writes a list of one as the number alone.
    return Answer(*(value if isinstance(value, list) else [value] for value in (ids, after)))


def _needs(module: str, fix: str) -> None:
    if find_spec(module) is None:
        raise Absent(fix)


def _script(command: Sequence[str | Path], task: Task) -> list[Answer]:
    arguments = [*command, task.folder, *task.prompts, "--tokens", task.tokens, "--json"]
    done = subprocess.run([str(part) for part in arguments], env=os.environ, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return [Answer(**json.loads(line)) for line in done.stdout.splitlines() if line.startswith("{")]
