"""The benchmark's command line.

    python -m benchmarks.throughput --model smollm2-135m --out benchmarks/throughput/results/smollm2-135m

The architecture is the recipe's, the weights are random. Every round measures each model once on the same tokens, so
that whatever else the machine does meets all of them; a figure is the median over rounds of the ratio within a round.

    scores    tokens/s of forward + backward to the scores, relative to the dense model's (gradients of activations)
    step      the same with the teacher's forward pass, which a training step needs as well, on the scores' side
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.quality.run import machine
from benchmarks.throughput.models import Subject, subjects
from soco_export.files.atomic import write_atomic
from soco_export.model.load import dense_config
from soco_export.preflight.doctor import versions
from soco_export.recipe.load import load_recipe
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.plan import PlanSettings

FLOORS = {"full": 0.45, "cut": 0.7}
TITLES = {"full": "every component", "cut": "cut to the size"}


@dataclass(frozen=True)
class Result:
    """Seconds of each measurement by round, and what they are of. `ratios` and `spread` are over rounds."""

    command: str
    machine: str
    model: str
    dtype: str
    tokens: int
    keep: float
    seconds: Mapping[str, Sequence[float]]
    ratios: Mapping[str, float]
    spread: Mapping[str, tuple[float, float]]
    multiplications: Mapping[str, float]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write."""
    options = parse(argv)
    result = measure(options)
    text = markdown(result)
    print(text)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    document = {"schema_version": 1, **asdict(result), "floors": FLOORS, "versions": versions()}
    write_atomic(options.out.with_suffix(".json"), json.dumps(document, indent=2) + "\n")
    write_atomic(options.out.with_suffix(".md"), text)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.throughput", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="smollm2-135m", help="a recipe: its architecture is taken")
    parser.add_argument("--keep", type=float, default=0.6, help="the size of the cut model, stacked, uniform ranks")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--out", type=Path, required=True, help="OUT.json and OUT.md are written")
    return parser.parse_args(argv)


def measure(options: argparse.Namespace) -> Result:
    """Run the rounds, the first one only to warm up."""
    recipe = load_recipe(options.model)
    dtype, device = getattr(torch, options.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(dense_config(recipe.override(["model.weights=random"]))).to(device, dtype)
    settings = PlanSettings(keep_params=options.keep, allocation="uniform")
    found, plan = subjects(model, dtype, settings)
    tokens = torch.randint(model.config.vocab_size, (options.batch, options.block), device=device)
    teacher = found["dense"].teach(tokens)
    seconds: dict[str, list[float]] = {}
    for number in range(options.rounds + 1):
        for name, value in _round(found, tokens, teacher).items():
            if number:
                seconds.setdefault(name, []).append(value)
    ratios = _ratios(seconds)
    return Result(
        command=shlex.join(["python", "-m", "benchmarks.throughput", *sys.argv[1:]]),
        machine=machine(),
        model=recipe.name,
        dtype=options.dtype,
        tokens=tokens.numel(),
        keep=plan.ratio,
        seconds=seconds,
        ratios={name: median(values) for name, values in ratios.items()},
        spread={name: (min(values), max(values)) for name, values in ratios.items()},
        multiplications=_multiplications(model, plan),
    )


def _round(found: Mapping[str, Subject], tokens: torch.Tensor, teacher: torch.Tensor) -> dict[str, float]:
    seconds = {"teacher": _timed(lambda: found["dense"].teach(tokens))}
    for name, subject in found.items():
        seconds[name] = _timed(lambda subject=subject: subject.learn(tokens, teacher))
    return seconds


def _timed(work: Callable[[], Any]) -> float:
    """Return seconds: of the processor on a CPU, where other programs would count too, by the clock on a GPU."""
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.process_time
    if gpu:
        torch.cuda.synchronize()
    started = clock()
    work()
    if gpu:
        torch.cuda.synchronize()
    return clock() - started


def _ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    ratios: dict[str, list[float]] = {}
    for name in FLOORS:
        rounds = list(zip(seconds["dense"], seconds[name], seconds["teacher"], strict=True))
        ratios[f"scores {name}"] = [dense / own for dense, own, _ in rounds]
        ratios[f"step {name}"] = [dense / (own + teacher) for dense, own, teacher in rounds]
    return ratios


def _multiplications(model: Any, plan: RankPlan) -> dict[str, float]:
    """Return the dense model's multiplications by weights relative to each form's: the ratio that they alone allow."""
    shapes = [layer.shape for layer in plan.layers.values()]
    head = model.get_output_embeddings().weight.numel()
    dense = head + sum(m * n for m, n in shapes)
    forms = {
        "full": head + sum(min(m, n) * (m + n) for m, n in shapes),
        "cut": head + sum(layer.rank * sum(layer.shape) for layer in plan.layers.values()),
    }
    # a backward pass through frozen weights is as many multiplications as the forward pass
    found = {f"scores {name}": dense / form for name, form in forms.items()}
    return found | {f"step {name}": 2 * dense / (2 * form + dense) for name, form in forms.items()}


def markdown(result: Result) -> str:
    """Return the page."""
    lines = [
        f"# Throughput of score training: {result.model}\n",
        f"    {result.command}\n",
        f"On {result.machine}. {result.dtype}, random weights at the model's true sizes, {result.tokens} tokens, "
        f"{len(result.seconds['dense'])} rounds in turns.",
        "1 is the dense model's forward and backward pass (frozen: gradients of activations alone), "
        f"{1000 * median(result.seconds['dense']):.0f} ms. Seconds are the processor's on a CPU, the clock's on a GPU; "
        "median over rounds (lowest to highest).\n",
        "| components | forward + backward to the scores | floor | with the teacher's pass | by multiplications |",
        "|---|---|---|---|---|",
    ]
    for name, floor in FLOORS.items():
        title = TITLES[name] + (f" {result.keep:.3g}" if name == "cut" else "")
        shown = [_shown(result, f"{kind} {name}") for kind in ("scores", "step")]
        allow = " / ".join(f"{result.multiplications[f'{kind} {name}']:.2f}" for kind in ("scores", "step"))
        lines.append(f"| {title} | {shown[0]} | {floor} | {shown[1]} | {allow} |")
    return "\n".join(lines) + "\n"


def _shown(result: Result, name: str) -> str:
    low, high = result.spread[name]
    return f"{result.ratios[name]:.2f} ({low:.2f} to {high:.2f})"
