"""c: a 7B model's true sizes with random weights: seconds, tokens/s, FLOP/s, and memory beside the dry run's figure.

The work is that of benchmarks.scale, a part in a process of its own. On a CPU the memory is the process's high-water
mark, and what the dry run says of a machine without a GPU is held against it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.document import Figures
from benchmarks.gpu.options import CUDA, Options
from benchmarks.scale.parts import Size, do
from benchmarks.scale.run import alike_in, sizes_of
from soco_export.bench.roofline import measure_bandwidth
from soco_export.model.load import dense_config
from soco_export.preflight.cost import estimate, measure
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_train.spectra.statistics import TOKENS_AT_ONCE

SHEET = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12}  # dense bf16 FLOP/s, as sold
SMALL = {  # Mistral's, two layers of it
    "model.architecture.hidden_size": 64,
    "model.architecture.intermediate_size": 224,
    "model.architecture.num_hidden_layers": 2,
    "model.architecture.num_attention_heads": 8,
    "model.architecture.num_key_value_heads": 2,
    "model.architecture.vocab_size": 512,
    "model.weights": "random",
}
MUON = {"refine.distill.optimiser": "muon", "refine.distill.teacher_top": 64}
KEEP = 0.8
# phases of the dry run, of which the largest is what a part should take
PHASES = {"decompose": ("statistics", "spectrum"), "train": ("scores",), "distil": ("distillation",)}


@dataclass(frozen=True)
class Amount:
    """How much each part does: (sequences, block, steps); layers of the cuts, fewest first, 0: all."""

    decompose: tuple[int, int]
    train: tuple[int, int, int]
    distil: tuple[int, int, int]
    cuts: tuple[int, ...]


AMOUNTS = {
    True: Amount((1, 32), (2, 16, 2), (2, 16, 2), (0,)),
    False: Amount((4, 2048), (8, 2048, 20), (2, 2048, 20), (4, 0)),
}


def parts(options: Options) -> Sequence[str]:
    """Return a process for every part of each recipe."""
    return [f"{part} {name}" for name in options.shapes for part in ("decompose", "train", "distil", "cut")]


def pieces(options: Options, part: str, box: TimeBox) -> Iterator[tuple[str, Any]]:
    """Yield the pieces of one process: ceilings, a layer of each shape, all layers in a training, a cut."""
    what, _, name = part.partition(" ")
    recipe, amount = shaped(name), AMOUNTS[options.small]
    layers = dense_config(recipe).num_hidden_layers
    if what == "decompose":
        yield "machine", partial(ceilings, 256 if options.small else 8192)
        size = Size(1, amount.decompose[1], amount.decompose[0], 0, KEEP)
        for only in alike_in(recipe):
            yield f"{part} {only.rpartition('.')[2]}", partial(_do, f"decompose:{only}", recipe, size, box)
    elif what == "cut":
        for count in dict.fromkeys(min(layers, count or layers) for count in amount.cuts):
            yield f"{part}, {count} layers", partial(_do, "cut", recipe, Size(count, 0, 0, 0, KEEP), box)
    else:
        sequences, block, steps = amount.train if what == "train" else amount.distil
        yield part, partial(_do, what, recipe, Size(layers, block, sequences, steps, KEEP), box)


def shaped(name: str) -> Recipe:
    """Return a recipe by name, small: Mistral's with small widths; all with Muon at 0.8."""
    recipe = load_recipe("mistral-7b" if name == "small" else name)
    return recipe.replace({**MUON, **(SMALL if name == "small" else {}), "keep_params": KEEP, "allocation": "uniform"})


def _do(part: str, recipe: Recipe, size: Size, box: TimeBox) -> Figures:
    """Do a part of benchmarks.scale, and say beside it what it should take and how well it used the device."""
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as work:
        found = do(part, recipe, size, Path(work), box)
    what = part.partition(":")[0]
    found["parts"] = found.pop("seconds", None)  # the runner's own figure goes under that name
    # on fewer tokens statistics take less than the dry run counts on
    known = what in PHASES and (what != "decompose" or size.sequences * size.block >= TOKENS_AT_ONCE)
    figures = {**found, **(memory(what, recipe, size, found) if known else {})}
    if "step_seconds" in found:
        short = {"short": True} if len(found["step_seconds"]) < size.steps else {}
        figures |= {**speed(what, recipe, size, found), **short}
    return figures


def memory(what: str, recipe: Recipe, size: Size, found: Mapping[str, Any]) -> dict[str, float]:
    """Return bytes, as predicted by the dry run for what was done and as measured, and how much more was measured."""
    tokens = size.sequences * size.block
    changes = {
        "model.architecture.num_hidden_layers": size.layers,
        "refine.distill.steps": max(1, size.steps),
        "refine.distill.batch_tokens": tokens,
        "train.batch_tokens": tokens,
        "data.block": size.block,
    }
    given = recipe.replace(changes if what != "decompose" else {key: changes[key] for key in list(changes)[:2]})
    card = estimate(given, measure(given))
    chosen = [phase for phase in card.phases if phase.name in PHASES[what]]
    predicted = max(phase.device if CUDA else phase.alone for phase in chosen)
    taken = found["gpu_taken"] if CUDA else found["host_peak"]
    return {"predicted": predicted, "taken": taken, "taken_over_predicted": taken / predicted}


def speed(what: str, recipe: Recipe, size: Size, found: Mapping[str, Any]) -> dict[str, float]:
    """Return tokens/s and FLOP/s: of the model, and with what is computed twice to save memory. None without a step."""
    if not found["step_seconds"]:
        return {}
    sizes, per_second = sizes_of(recipe), found["tokens"] / median(found["step_seconds"])

    def flops(recomputed: bool) -> float:
        if what == "train":
            return per_second * sizes.step_flops(size.layers, recomputed)
        return per_second * sizes.distillation_flops(size.layers, found["rank_sum"], recomputed)

    again = recipe.train if what == "train" else recipe.refine.distill
    figures = {
        "tokens_per_second": per_second,
        "model_flops": flops(False),
        "flops": flops(again.checkpoint_activations),
    }
    peak = next((peak for name, peak in SHEET.items() if CUDA and name in torch.cuda.get_device_name()), None)
    return figures | ({"utilisation": figures["model_flops"] / peak} if peak else {})


def ceilings(width: int) -> Figures:
    """Return what the device reaches at all: FLOP/s of one large product, bytes/s read, and its memory."""
    device, dtype = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float32)
    left, right = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    seconds = min(_timed_product(left, right) for _ in range(10))
    found = {"product_flops": 2 * width**3 / seconds, "bandwidth": measure_bandwidth(torch.get_num_threads(), device)}
    return found | ({"memory": torch.cuda.get_device_properties(0).total_memory} if CUDA else {})


def _timed_product(left: torch.Tensor, right: torch.Tensor) -> float:
    if CUDA:
        torch.cuda.synchronize()
    started = time.perf_counter()
    left @ right
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def row(figures: Figures) -> str:
    """Say a piece in a few words."""
    if "product_flops" in figures:
        return f"{figures['product_flops'] / 1e12:.3g} TFLOP/s, {figures['bandwidth'] / 1e9:.0f} GB/s"
    words = []
    if "tokens_per_second" in figures:
        used = f", {figures['utilisation']:.0%} of the sheet" if "utilisation" in figures else ""
        words.append(f"{figures['tokens_per_second']:.4g} tokens/s, {figures['model_flops'] / 1e12:.3g} TFLOP/s{used}")
    elif "parameters" in figures:
        words += [f"{what} {seconds:.1f} s" for what, seconds in figures["parts"].items()]
    elif "layers" in figures:
        words.append(f"{sum(figures['layers'].values()):.2f} s, covariances {figures['statistics_seconds']:.2f} s")
    if "predicted" in figures:
        words.append(f"{figures['taken'] / 1e9:.3g} GB, predicted {figures['predicted'] / 1e9:.3g}")
    return " · ".join(words)
