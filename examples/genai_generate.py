"""Generate from an exported folder with onnxruntime-genai, which brings its own loop and tokenizer.

python examples/genai_generate.py runs/demo/onnx "The state of the Union" --tokens 32
"""

from __future__ import annotations

import argparse
from pathlib import Path

import onnxruntime_genai as genai


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()

    model = genai.Model(str(arguments.folder))
    tokenizer = genai.Tokenizer(model)
    ids = tokenizer.encode(arguments.prompt)
    settings = genai.GeneratorParams(model)
    settings.set_search_options(max_length=len(ids) + arguments.tokens, do_sample=False)
    generator = genai.Generator(model, settings)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    print(tokenizer.decode(generator.get_sequence(0)))


if __name__ == "__main__":
    main()
