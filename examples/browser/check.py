"""Does the page say what PyTorch says? Exports a run for transformers.js, opens the page in Chromium, compares tokens.

    npm install --prefix examples/browser --ignore-scripts
    python examples/browser/check.py runs/demo --out examples/browser/results.json

float32 is compared with PyTorch's low-rank model; int8 and int4 with ONNX Runtime on the same weights, both computing
in float32 (`accuracy_level: 1`): with int8 activations each machine rounds in its own way. `--node` asks
transformers.js under Node instead. The exit code is 1 if a token differs or the page asked for anything outside its own
origin.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
WEIGHTS = ("same", "int8", "int4")
PROMPT = "My fellow citizens of the Senate"


def ask(folder: Path, tokens: int, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return what transformers.js says to the prompt, in Chromium or with `--node` under Node."""
    command = ["node", str(HERE / "run.mjs"), str(folder / "transformers.js"), PROMPT, "--tokens", str(tokens), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout)


def expected(hf: Path, onnx: Path, weights: str, ids: list[int], tokens: int) -> tuple[str, list[int]]:
    """Return who is right, and its greedy tokens after `ids`."""
    from soco_export.evaluate.settings import ValidateSettings
    from soco_export.runtimes.open import open_decoder

    name, folder = ("PyTorch", hf) if weights == "same" else ("ONNX Runtime", onnx)
    decoder = open_decoder(folder, ValidateSettings(), name)
    return name, decoder.generate(np.array([ids]), tokens)[0].tolist()


def check(hf: Path, work: Path, weights: str, tokens: int, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Export `hf` with these weights, ask, compare up to the end of the answer; return a row of the results."""
    from soco_export import export_onnx
    from soco_export.onnx.settings import ExportSettings

    table = {"embedding": "same", "accuracy_level": 1}
    settings = {"weights": weights, "quantize": table, "layouts": ["optimum", "transformers.js"]}
    export_onnx(hf, work / weights, ExportSettings.model_validate(settings))
    found = ask(work / weights, tokens, flags)
    against, right = expected(hf, work / weights, weights, found["ids"], tokens)
    equal = bool(found["tokens"]) and found["tokens"] == right[: len(found["tokens"])]
    return {**found, "against": against, "equal": equal}


def main() -> None:
    """Print a row per type, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--node", action="store_true")
    parser.add_argument("--out", type=Path, help="write the rows here, as JSON")
    given = parser.parse_args()
    flags = ("--node",) if given.node else ()
    with tempfile.TemporaryDirectory() as work:
        rows = [check(given.run / "hf", Path(work), weights, given.tokens, flags) for weights in WEIGHTS]
    for row in rows:
        print(f"{row['engine']}  {row['dtype']:5} {row['tokensPerSecond']:7.1f} tokens/s  ", end="")
        print(f"{len(row['tokens'])} tokens equal to {row['against']}'s: {row['equal']}")
    if given.out:
        command = f"python examples/browser/check.py {given.run} --tokens {given.tokens}" + " --node" * given.node
        given.out.write_text(json.dumps({"command": command, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    sys.exit(0 if all(row["equal"] and not row.get("elsewhere") for row in rows) else 1)


if __name__ == "__main__":
    main()
