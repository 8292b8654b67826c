"""Generate from an exported folder with onnxruntime-genai, which brings its own loop and tokenizer.

python examples/genai_generate.py runs/demo/onnx "The state of the Union" --tokens 32
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai


def generate(model: Any, ids: list[int], tokens: int) -> list[int]:
    """Return up to `tokens` greedy tokens after `ids`, an end token included."""
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + tokens, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    found: list[int] = []
    while not generator.is_done():
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="a line of JSON per prompt, with the token ids")
    arguments = parser.parse_args()

    model = genai.Model(str(arguments.folder))
    tokenizer = genai.Tokenizer(model)
    for prompt in arguments.prompts:
        ids = [int(token) for token in tokenizer.encode(prompt)]
        found = generate(model, ids, arguments.tokens)
        print(json.dumps({"ids": ids, "tokens": found}) if arguments.json else tokenizer.decode(ids + found))


if __name__ == "__main__":
    main()
