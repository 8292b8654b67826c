"""The parts of the benchmark: each builds the model, does its work by the calls of the product, and says what it took.

Weights are random, the sizes are true. Training and cut need components but not good ones, so theirs are W = W I (P = W
and B = I, or the other way round): as many numbers as real ones, and nothing to decompose.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from soco_export.bench.memory import high_water_mark
from soco_export.checkpoint.layers import apply_factors, count_parameters, stored_factors
from soco_export.checkpoint.stream import stream_checkpoint
from soco_export.export import export_onnx
from soco_export.model.load import dense_config
from soco_export.model.weights import map_weights
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.recipe import Recipe
from soco_train import method
from soco_train.events import Event, Notify, silent
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.distill import distill
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.spectra.decompose import decompose_model
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum, SpectrumStore

GPU = torch.cuda.is_available()
# On a CPU the processor's seconds, with which other programs have less to do.
_now = time.perf_counter if GPU else time.process_time


class TimeUp(Exception):
    """Raised by a watcher of events whose time is over; the steps until then count."""


@dataclass(frozen=True)
class Size:
    """How much is done: layers of the model, sequences × block tokens a step, steps; keep_params of the cut."""

    layers: int
    block: int
    sequences: int
    steps: int
    keep: float


class Unit(Mapping[str, Spectrum]):
    """W = W I, made when asked for, a layer at a time."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        self.linears = linears

    def __getitem__(self, name: str) -> Spectrum:
        weight = self.linears[name].weight.detach().float().clone()  # real ones share no memory with the weight
        k = min(weight.shape)
        unit = torch.eye(k, device=weight.device)
        P, B = (weight, unit) if weight.shape[0] >= weight.shape[1] else (unit, weight)
        return Spectrum(P, B, torch.ones(k))

    def __iter__(self) -> Iterator[str]:
        return iter(self.linears)

    def __len__(self) -> int:
        return len(self.linears)


def random_model(recipe: Recipe, layers: int) -> Any:
    """Return the recipe's architecture with `layers` layers where it trains: bf16 on a GPU, fp32 on the CPU."""
    config = dense_config(recipe)
    config.num_hidden_layers = layers
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if GPU else torch.float32)
    try:
        torch.manual_seed(0)
        with torch.device("cuda" if GPU else "cpu"):
            return AutoModelForCausalLM.from_config(config).eval()
    finally:
        torch.set_default_dtype(before)


def _peaks(model_bytes: int) -> dict[str, float]:
    """Return bytes at the worst moment: gpu_peak of tensors, gpu_taken of the whole device (cache and CUDA's own)."""
    peak = {"host_peak": high_water_mark(), "model": model_bytes}
    if not GPU:
        return peak
    free, total = torch.cuda.mem_get_info()
    context = total - free - torch.cuda.memory_reserved()
    taken = torch.cuda.max_memory_reserved() + context
    return peak | {"gpu_peak": torch.cuda.max_memory_allocated(), "gpu_taken": taken}


def _bytes(model: Any) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def shapes(model: Any, recipe: Recipe) -> dict[str, list[str]]:
    """Return the Linears of the first block, those of one shape under the name of the first of them."""
    found: dict[tuple[int, ...], list[str]] = {}
    for name, linear in select_linears(model, recipe.layers).items():
        if ".layers.0." in name:
            found.setdefault(tuple(linear.weight.shape), []).append(name)
    return {names[0]: names for names in found.values()}


def decompose(recipe: Recipe, size: Size, work: Path, only: str = "", watch: Notify = silent) -> dict[str, Any]:
    """Collect covariances and decompose all layers, or `only` one of the first block to speak for all of its shape."""
    model = random_model(recipe, 1 if only else size.layers)
    linears = select_linears(model, recipe.layers)
    chosen = {name: linear for name, linear in linears.items() if only in ("", name)}
    tokens = torch.randint(model.config.vocab_size, (size.sequences, size.block))
    clock = _Clock(watch)
    start = _now()
    decompose_model(model, chosen, tokens, recipe.train, SpectrumStore(work / "spectrum"), clock)
    return {
        "seconds": _now() - start,
        "layers": {event.values["layer"]: seconds for event, seconds in clock.of("spectrum")},
        "statistics_seconds": sum(seconds for _, seconds in clock.of("statistics")),
        "statistics_tokens": tokens.numel(),
        "largest_weight": max(8 * linear.weight.numel() for linear in chosen.values()),
        **_peaks(_bytes(model)),
    }


def train(recipe: Recipe, size: Size, work: Path, watch: Notify = silent) -> dict[str, Any]:
    """Learn the scores for a few steps; the first one warms up and does not count."""
    model = random_model(recipe, size.layers)
    linears = select_linears(model, recipe.layers)
    settings = recipe.train.model_copy(
        update={
            "steps": size.steps + 1,
            "batch_tokens": size.sequences * size.block,
            "scorer": "soco",
            "start": "ones",
            "checkpoint_every": size.steps + 1,
            "factor_dtype": "bfloat16" if GPU else "float32",
        }
    )
    clock = _Clock(watch)
    subject = Subject(model, linears, Unit(linears), _tokens(model, size))
    with suppress(TimeUp):
        method.learn_scores(subject, settings, _plan(size), Session(work / "train", clock))
    return {**_steps(clock, "train", size), "components": _components(linears), **_peaks(_bytes(model))}


def distil(recipe: Recipe, size: Size, work: Path, watch: Notify = silent) -> dict[str, Any]:
    """Distil random factors of the size for a few steps, with the recipe's optimiser; the first one does not count."""
    model = random_model(recipe, size.layers)
    linears = select_linears(model, recipe.layers)
    settings = recipe.refine.distill.model_copy(
        update={
            "steps": size.steps + 1,
            "batch_tokens": size.sequences * size.block,
            "checkpoint_every": size.steps + 1,
        }
    )
    clock = _Clock(watch)
    plan = plan_ranks(Scores({name: _scores(linear) for name, linear in linears.items()}), _plan(size))
    subject = Subject(model, linears, {}, _tokens(model, size))
    factors = random_factors({name: (*layer.shape, layer.rank) for name, layer in plan.layers.items()})
    with suppress(TimeUp):
        distill(subject, factors, settings, Session(work / "distil", clock))
    figures = {"teacher_seconds": sum(spent for _, spent in clock.of("teacher")), "rank_sum": _rank_sum(plan)}
    return {**_steps(clock, "distill", size), **figures, **_peaks(_bytes(model))}


def random_factors(sizes: Mapping[str, tuple[int, int, int]]) -> dict[str, StackedFactors]:
    """Return stacked factors of (m, n, r) by layer, all of them views of one pool: the host holds no second model."""
    largest = max(max(m, n) * r for m, n, r in sizes.values())
    pool = torch.randn(largest, generator=torch.Generator().manual_seed(0)).mul_(0.1 * largest**-0.25)
    return {
        name: StackedFactors(pool[: m * r].view(m, r), pool[: r * n].view(r, n), None)
        for name, (m, n, r) in sizes.items()
    }


def _tokens(model: Any, size: Size) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (size.sequences * (size.steps + 1), size.block))


def _steps(clock: _Clock, stage: str, size: Size) -> dict[str, Any]:
    return {"step_seconds": [spent for _, spent in clock.of(stage)][1:], "tokens": size.sequences * size.block}


def _components(linears: Mapping[str, nn.Linear]) -> int:
    return sum(min(linear.weight.shape) for linear in linears.values())


def _rank_sum(plan: RankPlan) -> int:
    """Return Σ r (m + n): the numbers that the factors hold."""
    return sum(layer.rank * sum(layer.shape) for layer in plan.layers.values())


def cut(recipe: Recipe, size: Size, work: Path, watch: Notify = silent) -> dict[str, Any]:
    """Cut a model that lies on disk in bf16 to the size, ranks uniform; its checkpoint and its ONNX model in fp16."""
    writer = get_context("spawn").Process(target=_store, args=(recipe, size.layers, work / "model"))
    writer.start()
    writer.join()
    model = map_weights(work / "model", AutoConfig.from_pretrained(work / "model"), trust_remote_code=False)
    before, stored = count_parameters(model), _bytes(model)
    linears = select_linears(model, recipe.layers)
    seconds: dict[str, float] = {}
    with _timed(seconds, "factors"):
        scores = Scores({name: _scores(linear) for name, linear in linears.items()})
        plan = plan_ranks(scores, _plan(size))
        subject = Subject(model, linears, Unit(linears), torch.empty(0, 1, dtype=torch.int64))
        factors = method.cut_factors(subject, scores, plan, RefineSettings(), Session(work))
        factors.save(work / "factors.safetensors")
    with _timed(seconds, "checkpoint"):
        layers = stored_factors(work / "factors.safetensors")
        apply_factors(model, layers, torch.float16, "meta")
        after = count_parameters(model)
        stream_checkpoint(model, layers, torch.float16, None, work / "hf")
    with _timed(seconds, "onnx"):
        export_onnx(work / "hf", work / "onnx", ExportSettings(dtype="float16"), watch)
    sizes = {name: sum(file.stat().st_size for file in (work / name).iterdir()) for name in ("hf", "onnx")}
    return {"seconds": seconds, "parameters": [before, after], "bytes": sizes, **_peaks(stored)}


def _store(recipe: Recipe, layers: int, folder: Path) -> None:
    random_model(recipe, layers).to(torch.bfloat16).save_pretrained(folder)


def _plan(size: Size) -> PlanSettings:
    return PlanSettings(keep_params=size.keep, allocation="uniform")


def _scores(linear: nn.Linear) -> LayerScores:
    k = min(linear.weight.shape)
    return LayerScores(torch.arange(k, 0, -1).float(), torch.ones(k), None, (linear.out_features, linear.in_features))


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = _now()
    yield
    seconds[name] = _now() - started


class _Clock:
    """Takes events and notes when each came; what passed since the one before is its own time."""

    def __init__(self, watch: Notify = silent) -> None:
        self.last = _now()
        self.events: list[tuple[Event, float]] = []
        self.watch = watch

    def __call__(self, event: Event) -> None:
        if GPU:
            torch.cuda.synchronize()
        now = _now()
        self.events.append((event, now - self.last))
        self.watch(event)
        self.last = _now()

    def of(self, stage: str) -> list[tuple[Event, float]]:
        return [entry for entry in self.events if entry[0].stage == stage]


PARTS: Mapping[str, Callable[..., dict[str, Any]]] = {
    "decompose": decompose,
    "train": train,
    "distil": distil,
    "cut": cut,
}


def do(part: str, recipe: Recipe, size: Size, work: Path, watch: Notify = silent) -> dict[str, Any]:
    """Do the part `NAME` or `decompose:LAYER` and return its figures and how much was done; `watch` sees its events."""
    name, _, only = part.partition(":")
    found = PARTS[name](recipe, size, work, *([only] if only else []), watch=watch)
    return {**found, "size": asdict(size), "threads": torch.get_num_threads()}
