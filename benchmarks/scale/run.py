"""The benchmark's command line.

    python -m benchmarks.scale --model mistral-7b --recipe shared/7b-soco --out benchmarks/scale/results/mistral-7b

On a GPU all layers are taken, 50 steps of 16384 tokens; without one, 2 layers, few tokens, and one layer of each shape
is decomposed for all of its shape: then what is said of the whole model is an estimate, and labelled so. --layers takes
a model whole that is small enough. Every part is a file in OUT as soon as it is done, and the same command goes on with
the others; --part does one of them.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.run import machine
from benchmarks.scale.estimate import H100_FLOPS, Sizes, hours_of_decomposition, training
from benchmarks.scale.parts import GPU, Size, do, shapes
from soco_export.files.atomic import write_atomic
from soco_export.model.load import dense_config
from soco_export.preflight.doctor import versions
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_train.modules.layers import select_linears

TOKENS = 30e6  # of score training: what the whole is extrapolated to


def main(argv: Sequence[str] | None = None) -> None:
    """Do the parts that are not there yet, each in a process of its own; write the page."""
    options = parse(argv)
    recipe, size = load_recipe(options.model, overlay=options.recipe, name=options.model), sized(options)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.inside:
        with tempfile.TemporaryDirectory(dir=options.work) as work:
            found = do(options.part, recipe, size, Path(work))
        write_atomic(_file(options.out, options.part), json.dumps(found, indent=2) + "\n")
        return
    alike = alike_in(recipe)
    whole = GPU or size.layers == dense_config(recipe).num_hidden_layers
    wanted = [*(["decompose"] if whole else [f"decompose:{name}" for name in alike]), "train", "cut"]
    results = options.out / "results.json"
    there = json.loads(results.read_text(encoding="utf-8"))["parts"] if results.exists() else {}
    for part in options.part.split(",") if options.part else wanted:
        if part not in there:
            print(f"{part} …", flush=True)
            words = [*(sys.argv[1:] if argv is None else argv), "--inside", "--part", part]
            subprocess.run([sys.executable, "-m", "benchmarks.scale", *words], check=True)
            there[part] = json.loads(_file(options.out, part).read_text(encoding="utf-8"))
            write(options, recipe, size, {name: there[name] for name in wanted if name in there}, alike)
            _file(options.out, part).unlink()
    write(options, recipe, size, {name: there[name] for name in wanted if name in there}, alike)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="mistral-7b", help="a recipe: its architecture is taken")
    parser.add_argument("--recipe", type=Path, help="laid over it: shared/7b-soco where scores are learnt")
    parser.add_argument("--layers", type=int, help="default: all on a GPU, else 2")
    parser.add_argument("--block", type=int, default=2048 if GPU else 128)
    parser.add_argument("--sequences", type=int, default=8 if GPU else 1, help="a step")
    parser.add_argument("--steps", type=int, default=50 if GPU else 3)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument(
        "--part", default="", help="decompose, decompose:LAYER, train, cut: these alone, comma between them"
    )
    parser.add_argument("--work", type=Path, help="where the parts put what they write; default: the system's")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def sized(options: argparse.Namespace) -> Size:
    """Return how much is done."""
    layers = options.layers or (dense_config(load_recipe(options.model)).num_hidden_layers if GPU else 2)
    return Size(layers, options.block, options.sequences, options.steps, options.keep)


def _file(out: Path, part: str) -> Path:
    return out / f"{part.replace(':', '-')}.json"


def _bare(recipe: Recipe) -> Any:
    """Return the model without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(dense_config(recipe))


def alike_in(recipe: Recipe) -> dict[str, int]:
    """Return one layer of each shape in a block, and how many of them a block has."""
    return {name: len(names) for name, names in shapes(_bare(recipe), recipe).items()}


def sizes_of(recipe: Recipe) -> Sizes:
    model = _bare(recipe)
    linears = select_linears(model, recipe.layers)
    block = [(x.out_features, x.in_features) for name, x in linears.items() if ".layers.0." in name]
    return Sizes(block, model.get_output_embeddings().weight.numel())


def write(
    options: argparse.Namespace, recipe: Recipe, size: Size, parts: Mapping[str, Any], alike: Mapping[str, int]
) -> None:
    """Write results.json and results.md from the parts that are there."""
    layers = dense_config(recipe).num_hidden_layers
    document: dict[str, Any] = {
        "schema_version": 1,
        "command": shlex.join(["python", "-m", "benchmarks.scale", *_asked(options)]),
        "model": recipe.name,
        "machine": machine(),
        "estimate": size.layers < layers,
        "layers": layers,
        "parts": parts,
        "versions": versions(),
    }
    pieces = {name: part for name, part in parts.items() if name.startswith("decompose")}
    if len(pieces) == (1 if "decompose" in pieces else len(alike)):
        document["decomposition_hours"] = hours_of_decomposition(pieces, alike, layers)
    if "train" in parts:
        recomputed = recipe.train.checkpoint_activations
        document["training"] = training(parts["train"], sizes_of(recipe), layers, TOKENS, recomputed)
    write_atomic(options.out / "results.json", json.dumps(document, indent=2) + "\n")
    write_atomic(options.out / "results.md", "\n".join(_page(document, alike)) + "\n")
    print((options.out / "results.md").read_text(encoding="utf-8"))


def _asked(options: argparse.Namespace) -> list[str]:
    layers = ["--layers", str(options.layers)] if options.layers else []
    return ["--model", options.model, *layers, "--out", str(options.out)]


def _page(document: Mapping[str, Any], alike: Mapping[str, int]) -> list[str]:
    parts, layers = document["parts"], document["layers"]
    lines = [f"# {document['model']} at its true sizes\n", f"    {document['command']}\n", f"On {document['machine']}."]
    if document["estimate"]:
        lines.append(
            "Random weights. **What is said of the whole model is an estimate** from the layers that were measured, by "
            "multiplications; this machine has no GPU that takes them all. Seconds are the processor's."
        )
    else:
        lines.append("Random weights; all layers." + ("" if GPU else " Seconds are the processor's."))
    lines += ["", "| part | what | measured | peak host | peak GPU |", "|---|---|---|---|---|"]
    for name, part in parts.items():
        lines.append(f"| {name} | {_what(name, part, alike)} | {_took(name, part)} | {_memory(part)} |")
    lines += ["", "| the whole model | |", "|---|---|"]
    if "decomposition_hours" in document:
        hours = document["decomposition_hours"]
        spent = f"{hours:.2f} h" if hours > 0.1 else f"{3600 * hours:.0f} s"
        lines.append(f"| decomposition of {layers} layers | {spent} |")
    if "training" in document:
        found = document["training"]
        lines += [
            f"| score training, {layers} layers | {found['tokens_per_second_all_layers']:.3g} tokens/s{_mfu(found)} |",
            f"| … {TOKENS / 1e6:g} M tokens | {found['hours_all_tokens']:.3g} h on this machine |",
            f"| … on one H100 at 40 % of 989 TFLOP/s | {found['h100_hours_at_40_percent']:.2f} h (computed) |",
        ]
    return lines


def _mfu(found: Mapping[str, float]) -> str:
    return f", {found['flops'] / H100_FLOPS:.0%} of an H100's {H100_FLOPS / 1e12:.0f} TFLOP/s" if GPU else ""


def _what(name: str, part: Mapping[str, Any], alike: Mapping[str, int]) -> str:
    size = part["size"]
    if name.startswith("decompose:"):
        return f"1 layer, one of {alike[name.partition(':')[2]]} of its shape in a block"
    if name == "train":
        return f"{size['layers']} layers, {size['steps']} steps of {part['tokens']} tokens"
    return f"{size['layers']} layers"


def _took(name: str, part: Mapping[str, Any]) -> str:
    if name.startswith("decompose"):
        return f"{sum(part['layers'].values()):.1f} s, covariances {part['statistics_seconds']:.1f} s"
    if name == "train":
        speed = part["tokens"] * len(part["step_seconds"]) / sum(part["step_seconds"])
        return f"{speed:.3g} tokens/s"
    return ", ".join(f"{what} {seconds:.1f} s" for what, seconds in part["seconds"].items())


def _memory(part: Mapping[str, Any]) -> str:
    host = f"{part['host_peak'] / 2**30:.1f} GiB (model {part['model'] / 2**30:.1f})"
    return f"{host} | {part['gpu_peak'] / 2**30:.1f} GiB" if "gpu_peak" in part else f"{host} | –"
