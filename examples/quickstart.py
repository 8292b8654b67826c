"""Every stage in Python: learn scores, choose a size, write the model as a Hugging Face and as an ONNX folder.

python examples/quickstart.py --out runs/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from soco_export import apply_factors, export_onnx, save_checkpoint
from soco_export.model.source import BUILTIN_MODEL
from soco_export.onnx.settings import ExportSettings
from soco_export.run.verbs import Request, validate
from soco_train import DataSettings, PlanSettings, TrainSettings, cut_factors, learn_scores, load_blocks, plan_ranks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(BUILTIN_MODEL), help="a folder or hub id; default: the built-in model")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()

    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tokens = load_blocks(tokenizer, DataSettings(builtin="speeches", block=256, blocks=64), "calibration").tokens

    # Scores are learnt once, for a size to head for ...
    size = PlanSettings(keep_params=0.8)
    scores = learn_scores(model, tokens, arguments.out, TrainSettings(steps=arguments.steps), size)
    # ... and cut to this size, or to any other.
    plan = plan_ranks(scores, size)
    print(plan.describe(model.num_parameters()))
    apply_factors(model, cut_factors(model, tokens, scores, plan, arguments.out))

    save_checkpoint(model, tokenizer, arguments.out / "hf")
    export_onnx(arguments.out / "hf", arguments.out / "onnx", ExportSettings())
    # Every verb of the command line is a function too: this one proves the export.
    proof = validate(
        Request(set_=["evaluation.builtin=speeches", "evaluation.blocks=4"]),
        arguments.out / "onnx",
        against=arguments.out / "hf",
    )
    print(proof.text)


if __name__ == "__main__":
    main()
