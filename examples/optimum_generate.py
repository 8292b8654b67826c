"""Generate from an exported folder with optimum, in an environment that has `soco-export[optimum]`.

python examples/optimum_generate.py runs/demo/onnx "The state of the Union" --tokens 32
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--json", action="store_true", help="a line of JSON per prompt, with the token ids")
    arguments = parser.parse_args()

    model = ORTModelForCausalLM.from_pretrained(arguments.folder)
    tokenizer = AutoTokenizer.from_pretrained(arguments.folder)
    for prompt in arguments.prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        start = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=arguments.tokens, do_sample=False, pad_token_id=0)[0].tolist()
        ids, found = tokens[:start], tokens[start:]
        print(json.dumps({"ids": ids, "tokens": found}) if arguments.json else tokenizer.decode(ids + found))


if __name__ == "__main__":
    main()
