"""Generate from an exported folder with ONNX Runtime and the tokenizer alone: no torch, no transformers, none of ours.

python examples/onnxruntime_generate.py runs/demo/onnx "The state of the Union" --tokens 32
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.capi.onnxruntime_pybind11_state import NotImplemented as NoKernel
from tokenizers import Tokenizer

# of the cache; numpy has no bfloat16
TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,  # two numbers of 4 bits
}


def open_session(path: Path) -> Any:
    """Return the session, or say why this model cannot run here."""
    try:
        # By path: model.onnx.data is looked for beside model.onnx.
        return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except NoKernel as error:
        raise SystemExit(f"{error}\nbfloat16 is not supported on the CPU: export float32 or float16") from error


def end_tokens(folder: Path) -> set[int]:
    """Return the ids that end an answer; none where no file names them."""
    for path in (folder / "generation_config.json", folder / "config.json"):
        end = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.exists() else None
        if end is not None:
            return set(end if isinstance(end, list) else [end])
    return set()


def generate(session: Any, ids: list[int], tokens: int, ends: set[int]) -> Iterator[int]:
    """Yield up to `tokens` greedy tokens after `ids`, stopping after one of `ends`."""
    # The cache starts empty: [batch 1, key/value heads, 0 tokens so far, head size].
    inputs = {entry.name: entry for entry in session.get_inputs()}
    cache = {
        name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), TYPES[entry.type])
        for name, entry in inputs.items()
        if name.startswith("past_key_values.")
    }
    outputs = ["logits", *(name.replace("past_key_values", "present") for name in cache)]
    new = np.array([ids], np.int64)  # the whole prompt first, then one token at a time
    seen = 0
    for _ in range(tokens):
        feeds = {
            "input_ids": new,
            "attention_mask": np.ones((1, seen + new.shape[1]), np.int64),
            "position_ids": np.arange(seen, seen + new.shape[1], dtype=np.int64)[None],
        }
        logits, *present = session.run(outputs, {name: feeds[name] for name in feeds if name in inputs} | cache)
        cache = dict(zip(cache, present, strict=True))
        seen += new.shape[1]
        token = int(logits[0, -1].argmax())
        yield token
        if token in ends:
            return
        new = np.array([[token]], np.int64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="a line of JSON per prompt, with the token ids")
    arguments = parser.parse_args()

    session, ends = open_session(arguments.folder / "model.onnx"), end_tokens(arguments.folder)
    tokenizer = Tokenizer.from_file(str(arguments.folder / "tokenizer.json"))
    for prompt in arguments.prompts:
        ids = tokenizer.encode(prompt).ids
        found = list(generate(session, ids, arguments.tokens, ends))
        print(json.dumps({"ids": ids, "tokens": found}) if arguments.json else tokenizer.decode(ids + found))


if __name__ == "__main__":
    main()
