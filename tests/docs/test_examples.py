"""The examples run as they stand on a finished run of the built-in model; those without torch, as processes."""

from __future__ import annotations

import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings
from tests.support.decoders import Decoder

EXAMPLES = Path(__file__).parents[2] / "examples"
PROMPT = "My fellow citizens of the Senate"


def run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        [str(part) for part in command], cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True
    )


def here(example: str, *arguments: str | Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a Python example in this process, which has imported what it needs; return what it prints."""
    monkeypatch.setattr(sys, "argv", [example, *map(str, arguments)])
    monkeypatch.setattr("soco_export.report.pages.html.draw_plots", lambda *given: ([], ""))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        runpy.run_path(str(EXAMPLES / example), run_name="__main__")
    return out.getvalue()


NODE = EXAMPLES / "node" / "generate.mjs"
NEEDS_NODE = pytest.mark.skipif(
    shutil.which("node") is None or not (NODE.parent / "node_modules").exists(),
    reason="no onnxruntime-node here: npm install --prefix examples/node --ignore-scripts",
)
# The two examples that have a loop of their own, and so choose the cache's type and the end themselves.
LOOPS = pytest.mark.parametrize(
    "loop",
    [
        pytest.param((sys.executable, EXAMPLES / "onnxruntime_generate.py"), id="python"),
        pytest.param(("node", NODE), id="node", marks=NEEDS_NODE),
    ],
)
Loop = tuple[str | Path, ...]


def tokens_of(loop: Loop, folder: Path) -> list[int]:
    done = run(*loop, folder, PROMPT, "--tokens", "16", "--json")
    assert done.returncode == 0, done.stderr
    return [int(token) for token in json.loads(done.stdout)["tokens"]]


def greedy(folder: Path, ids: list[int]) -> list[int]:
    """Return 16 tokens of the graph, whatever they are."""
    decoder, found = Decoder(folder), list[int]()
    new = np.array([ids], np.int64)
    while len(found) < 16:
        mask = np.ones((1, len(ids) + len(found)), np.int64)
        found.append(int(decoder.step(new, mask)[0, -1].argmax()))
        new = np.array([found[-1:]], np.int64)
    return found


def prompt_ids(folder: Path) -> list[int]:
    from tokenizers import Tokenizer

    return list(Tokenizer.from_file(str(folder / "tokenizer.json")).encode(PROMPT).ids)


def generate(example: str, tiny_run: Path) -> str:
    done = run(sys.executable, EXAMPLES / example, tiny_run / "onnx", PROMPT, "--tokens", "16")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def torch_continuation(tiny_run: Path) -> str:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_run / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tiny_run / "hf")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    found = model.generate(ids, do_sample=False, max_new_tokens=16, pad_token_id=0)
    return str(tokenizer.decode(found[0], skip_special_tokens=True)).strip()


@pytest.mark.transformers
def test_quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = here("quickstart.py", "--out", tmp_path / "run", "--steps", "2", monkeypatch=monkeypatch)
    assert "layers left dense" in said
    assert "ok     max_export_kl" in said
    assert (tmp_path / "run" / "onnx" / "model.onnx").exists()


def test_pick_a_size(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(tiny_run, tmp_path / "run")
    said = here("pick_a_size.py", tmp_path / "run", "0.9", "0.6", monkeypatch=monkeypatch)
    rows = [line.split() for line in said.splitlines()[1:]]
    assert [row[0] for row in rows] == ["0.9", "0.6"]
    parameters = [int(row[1].replace(",", "")) for row in rows]
    assert parameters[0] > parameters[1]


@pytest.mark.transformers
def test_plain_onnxruntime_gives_the_tokens_of_torch(tiny_run: Path) -> None:
    assert generate("onnxruntime_generate.py", tiny_run) == torch_continuation(tiny_run)


@LOOPS
def test_the_generation_config_says_first_what_ends_an_answer(loop: Loop, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    shutil.copytree(tiny_run / "onnx", folder, ignore=shutil.ignore_patterns("triton"))
    whole = greedy(folder, prompt_ids(folder))
    early, late = whole[0], list(dict.fromkeys(whole))[-1]
    assert early != late
    to_late = whole[: whole.index(late) + 1]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))

    def ended_by(generation: dict[str, object] | None, end: object) -> list[int]:
        (folder / "generation_config.json").unlink(missing_ok=True)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
        config.pop("eos_token_id", None)
        named = {} if end is None else {"eos_token_id": end}
        (folder / "config.json").write_text(json.dumps(config | named), encoding="utf-8")
        return tokens_of(loop, folder)

    assert ended_by({"eos_token_id": late}, early) == to_late
    assert ended_by({"eos_token_id": [10**6, late]}, early) == to_late
    assert ended_by({}, late) == ended_by(None, [late]) == to_late
    assert ended_by(None, None) == whole


@LOOPS
def test_the_cache_has_the_type_of_the_graph(loop: Loop, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "onnx"
    export_onnx(tiny_run / "hf", folder, ExportSettings(dtype="float16"))
    found = tokens_of(loop, folder)
    assert found == greedy(folder, prompt_ids(folder))[: len(found)]


@LOOPS
def test_a_bfloat16_export_is_refused_in_words(loop: Loop, tiny_run: Path, tmp_path: Path) -> None:
    export_onnx(tiny_run / "hf", tmp_path / "onnx", ExportSettings(dtype="bfloat16"))
    done = run(*loop, tmp_path / "onnx", PROMPT)
    assert done.returncode == 1
    assert "bfloat16 is not supported" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(find_spec("onnxruntime_genai") is None, reason="no onnxruntime-genai here")
def test_genai_gives_the_tokens_of_torch(tiny_run: Path) -> None:
    assert generate("genai_generate.py", tiny_run) == torch_continuation(tiny_run)


def test_the_generation_loop_needs_nothing_of_ours(tiny_run: Path) -> None:
    script = f"""
import runpy, sys
sys.argv = ["", {str(tiny_run / "onnx")!r}, {PROMPT!r}, "--tokens", "2"]
runpy.run_path({str(EXAMPLES / "onnxruntime_generate.py")!r}, run_name="__main__")
assert not {{"torch", "transformers", "soco_export"}} & set(sys.modules)
"""
    assert run(sys.executable, "-c", script).returncode == 0


BROWSER = EXAMPLES / "browser"
NEEDS_TRANSFORMERS_JS = pytest.mark.skipif(
    shutil.which("node") is None or not (BROWSER / "node_modules").exists(),
    reason="no transformers.js here: npm install --prefix examples/browser --ignore-scripts",
)
NEEDS_CHROMIUM = pytest.mark.skipif(
    not Path(os.environ.get("CHROMIUM", "/usr/bin/chromium")).exists(), reason="no Chromium here: CHROMIUM=PATH"
)


@NEEDS_TRANSFORMERS_JS
@pytest.mark.parametrize(
    ("weights", "flags"),
    [
        pytest.param("same", (), marks=NEEDS_CHROMIUM, id="chromium"),
        pytest.param("same", ("--node",), id="node"),
        pytest.param("int4", ("--node",), id="node-int4"),
    ],
)
def test_transformers_js_gives_the_tokens_of_torch(
    weights: str, flags: tuple[str, ...], tiny_run: Path, tmp_path: Path
) -> None:
    check = runpy.run_path(str(BROWSER / "check.py"))["check"]
    row = check(tiny_run / "hf", tmp_path, weights, 16, flags)
    assert row["equal"], row
    assert row["tokensPerSecond"] > 0
    if not flags:
        assert row["elsewhere"] == []
        assert f"{len(row['tokens'])} tokens, " in row["shown"]


def test_what_the_browser_said_is_committed_and_was_right() -> None:
    rows = json.loads((BROWSER / "results.json").read_text(encoding="utf-8"))["rows"]
    assert {row["dtype"] for row in rows} == {"fp32", "q8", "q4"}
    assert all(row["engine"].startswith("Chromium") and row["equal"] and not row["elsewhere"] for row in rows)
