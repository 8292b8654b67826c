"""Memory and hours of the training half, phase by phase: statistics and spectrum, then what each step says."""

from __future__ import annotations

from collections.abc import Callable

from soco_export.preflight.cost_card import Phase
from soco_export.preflight.cost_shape import BASE_CPU, BASE_DEVICE, BASE_HOST, host, hours
from soco_export.recipe.recipe import Recipe
from soco_train.cost import (
    BYTES,
    DENSE_BYTES,
    DOUBLE_BYTES,
    Cost,
    ModelShape,
    Task,
    logits,
    ranks,
    saved_by_the_rest,
)
from soco_train.forms.registry import find_form
from soco_train.refine.rungs import wanted_rungs
from soco_train.scores.registry import find_scorer
from soco_train.spectra.bases import find_basis
from soco_train.spectra.statistics import TOKENS_AT_ONCE, passes, sums_bytes


def task_of(recipe: Recipe) -> Task:
    """Return what the recipe asks of the training half."""
    trained = find_scorer(recipe.train.scorer).trains
    return Task(recipe.data, recipe.train, recipe.plan, recipe.refine, trained)


def step_costs(recipe: Recipe, shape: ModelShape, width: int) -> dict[str, Cost | None]:
    """Return what the scorer and each rung that is asked for say they take, by name."""
    task = task_of(recipe)
    steps = {"scores": find_scorer(recipe.train.scorer).cost}
    steps |= {rung.name: rung.cost for rung in wanted_rungs(recipe.refine)}
    return {name: cost(task, shape, width) for name, cost in steps.items()}


def training_phases(recipe: Recipe, shape: ModelShape) -> list[Phase]:
    """Peak memory where it trains depends on the bytes of a weight there: fp32 on the CPU, train.factor_dtype on a GPU.

    Beside a GPU the host holds what is on its way there.
    """
    passing = host(recipe, shape)
    width = BYTES[recipe.train.factor_dtype]
    on_gpu, on_cpu = (step_costs(recipe, shape, bytes_each) for bytes_each in (width, DENSE_BYTES))

    def phase(name: str, memory: Callable[[Recipe, ModelShape, int], int], spent: float) -> Phase:
        device, alone = (memory(recipe, shape, bytes_each) for bytes_each in (width, DENSE_BYTES))
        return Phase(name, BASE_DEVICE + device, passing, spent, BASE_CPU + alone)

    def step(name: str) -> list[Phase]:
        here, alone = on_gpu[name], on_cpu[name]
        if here is None or alone is None:
            return []
        peaks = (BASE_DEVICE + here.memory, passing + here.beside)
        return [Phase(here.phase or name, *peaks, _hours(here), BASE_CPU + max(alone.memory, alone.beside))]

    rungs = wanted_rungs(recipe.refine)
    after = {rung.name: rung.trains for rung in rungs if rung.on == "factors"}
    training = [name for name, trains in after.items() if trains]
    return [
        phase("statistics", _statistics_memory, _statistics_hours(recipe, shape)),
        phase("spectrum", _spectrum_memory, hours(_spectrum_flops(shape), "float64")),
        *(step("scores") or [Phase("scores", 0, BASE_HOST, 0.0, BASE_CPU)]),
        *(found for rung in rungs if rung.on == "scores" for found in step(rung.name)),
        *(found for name in training for found in step(name)),
        *([] if training else [_factors(recipe, shape, [on_gpu[rung.name] for rung in rungs if rung.on == "factors"])]),
    ]


def _hours(cost: Cost) -> float:
    return sum(hours(flops, dtype) for dtype, flops in cost.flops.items())


def _factors(recipe: Recipe, shape: ModelShape, rungs: list[Cost | None]) -> Phase:
    """Return the phase of a cut that nothing trains after; what its rungs hold lies where they work and on the host."""
    costs = [cost for cost in rungs if cost is not None]
    held = sum(cost.memory for cost in costs)
    cut = _cut_memory(recipe, shape) + held
    sizes = (BYTES[recipe.train.factor_dtype], DENSE_BYTES)
    device, alone = (size * shape.parameters + held for size in sizes)
    on_host = max(host(recipe, shape), BASE_HOST + cut)
    return Phase("factors", BASE_DEVICE + device, on_host, sum(map(_hours, costs)), on_cpu=BASE_CPU + alone + cut)


def _cut_memory(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the layer that takes most.

    Its spectrum in fp32, and what survives, [m, r] and [r, n], in float64 twice and in fp32 with that of the layer
    before; or, while pivots are chosen, about seven float64 arrays of [m, r] beside those in fp32.
    """
    form = find_form(recipe.storage)

    def one(m: int, n: int, r: float) -> float:
        survivors = r * (m + n)
        cut = DENSE_BYTES * min(m, n) * (m + n) + 2 * (DOUBLE_BYTES + DENSE_BYTES) * survivors
        converting = form.cut_bytes(r, m, n)
        return max(cut, 2 * DENSE_BYTES * survivors + converting if converting else 0)

    return int(max(one(m, n, r) for (m, n), r in zip(shape.linears, ranks(recipe.plan, shape), strict=True)))


def _statistics_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    tokens = TOKENS_AT_ONCE
    widest = max(max(pair) for pair in shape.linears)
    # inputs in fp32, and half of a sum while it is mirrored
    memory = tokens * DENSE_BYTES * 4 * widest + DOUBLE_BYTES * widest * widest
    if _backward(recipe):
        memory += tokens * saved_by_the_rest(shape, width) + logits(tokens, shape, tokens, width)
    return width * shape.parameters + _sums(recipe, shape) + memory


def _spectrum_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    # a layer's covariance with its factor and inverse, and the weight in three forms, all float64
    working = max(DOUBLE_BYTES * (4 * n * n + 4 * m * n) for m, n in shape.linears)
    return width * shape.parameters + _sums(recipe, shape) + working


def _sums(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the statistics of one group of layers."""
    sizes = _sums_of_layers(recipe, shape)
    return max(sum(sizes[part]) for part in passes(sizes, recipe.train.statistics_memory))


def _sums_of_layers(recipe: Recipe, shape: ModelShape) -> list[int]:
    needs = find_basis(recipe.train.basis).needs
    return [sums_bytes(pair, needs) if needs else 0 for pair in shape.linears]


def _backward(recipe: Recipe) -> bool:
    return not find_basis(recipe.train.basis).needs <= {"input_covariance", "input_magnitude"}


def _statistics_hours(recipe: Recipe, shape: ModelShape) -> float:
    """A pass of the model for each group of layers, and the sums in fp32."""
    sizes = _sums_of_layers(recipe, shape)
    tokens = (recipe.train.statistics_blocks or recipe.data.blocks or 128) * recipe.data.block
    forwards = len(passes(sizes, recipe.train.statistics_memory)) * (3 if _backward(recipe) else 1)
    model = hours(2.0 * tokens * forwards * shape.active, recipe.train.factor_dtype)
    return model + hours(2.0 * tokens * shape.met(sizes) / DOUBLE_BYTES, "float32")


def _spectrum_flops(shape: ModelShape) -> float:
    # eigendecomposition 9 k³, Cholesky and triangular solve, three products of the weight's size
    return sum(9.0 * min(m, n) ** 3 + n**3 / 3 + 6.0 * m * n * min(m, n) for m, n in shape.linears)
