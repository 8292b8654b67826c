"""Memory and hours of the training half, phase by phase: statistics, spectrum, scores, compensation, the factors."""

from __future__ import annotations

import math
from collections.abc import Callable

from soco_export.preflight.cost_card import Phase
from soco_export.preflight.cost_shape import (
    BASE_DEVICE,
    BASE_HOST,
    BYTES,
    DENSE_BYTES,
    DOUBLE_BYTES,
    ModelShape,
    host,
    hours,
)
from soco_export.recipe.recipe import Recipe
from soco_train.forms.registry import find_form, rank_at
from soco_train.refine.compensate import FISHER_AT_ONCE
from soco_train.spectra.bases import find_basis
from soco_train.spectra.statistics import SUMS_AT_ONCE, sums_bytes

STATISTICS_TOKENS_AT_ONCE = 2048
KEPT_BY = {"adamw": 2, "muon": 1}  # numbers that the optimiser keeps for each parameter
# bytes for each number of the matrix whose step Muon takes: the update in fp32; in bf16 three as large, two at most
MUON_AT_ONCE = 4 + 2 * 5
ROUNDING_AT_ONCE = 4 * 4  # and of the matrix that is rounded: four in fp32


def training_phases(recipe: Recipe, shape: ModelShape) -> list[Phase]:
    """Peak memory where it trains depends on the bytes of a weight there: fp32 on the CPU, train.factor_dtype on a GPU.

    Beside a GPU the host holds what is on its way there.
    """
    passing = host(recipe, shape)
    width = BYTES[recipe.train.factor_dtype]

    def phase(name: str, memory: Callable[[Recipe, ModelShape, int], int], spent: float, beside: int = 0) -> Phase:
        return Phase(name, memory(recipe, shape, width), passing + beside, spent, memory(recipe, shape, DENSE_BYTES))

    phases = [
        phase("statistics", _statistics_memory, _statistics_hours(recipe, shape)),
        phase("spectrum", _spectrum_memory, hours(_spectrum_flops(shape), "float64")),
        Phase("scores", 0, BASE_HOST, 0.0)
        if recipe.train.scorer == "singular-values"
        else phase("scores", _scores_memory, hours(_scores_flops(recipe, shape), recipe.train.factor_dtype)),
    ]
    if recipe.refine.compensate.blocks and not recipe.train.trains:
        phases.append(phase("compensation", _compensation_memory, _compensation_hours(recipe, shape)))
    if recipe.refine.distill.steps:
        spent = hours(_distillation_flops(recipe, shape), recipe.train.factor_dtype)
        if recipe.refine.distill.optimiser == "muon":
            spent += recipe.refine.distill.steps * hours(_muon_flops(recipe, shape), "bfloat16")
        beside = DENSE_BYTES * stacked(recipe, shape)
        if recipe.refine.distill.teacher_top:
            beside += width * shape.selected  # parked
        phases.append(phase("distillation", _distillation_memory, spent, beside))
    else:
        cut = _cut_memory(recipe, shape)
        device, alone = (BASE_DEVICE + size * shape.parameters for size in (width, DENSE_BYTES))
        if recipe.refine.refit.blocks:  # holds them all, where it fits them and when they are fitted
            cut, device, alone = (part + DENSE_BYTES * stacked(recipe, shape) for part in (cut, device, alone))
        phases.append(Phase("factors", device, max(passing, BASE_HOST + cut), 0.0, on_cpu=alone + cut))
    return phases


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

    return int(max(one(m, n, r) for (m, n), r in zip(shape.linears, _ranks(recipe, shape), strict=True)))


def _statistics_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    tokens = STATISTICS_TOKENS_AT_ONCE
    widest = max(max(pair) for pair in shape.linears)
    # inputs in fp32, and half of a sum while it is mirrored
    memory = tokens * DENSE_BYTES * 4 * widest + DOUBLE_BYTES * widest * widest
    if _backward(recipe):
        memory += tokens * _saved_by_the_rest(shape, width) + _logits(tokens, shape, tokens, width)
    return BASE_DEVICE + width * shape.parameters + _sums(recipe, shape) + memory


def _spectrum_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    # a layer's covariance with its factor and inverse, and the weight in three forms, all float64
    working = max(DOUBLE_BYTES * (4 * n * n + 4 * m * n) for m, n in shape.linears)
    return BASE_DEVICE + width * shape.parameters + _sums(recipe, shape) + working


def _sums(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the statistics of one group of layers."""
    sizes = _sums_of_layers(recipe, shape)
    return min(sum(sizes), max(SUMS_AT_ONCE, *sizes))


def _sums_of_layers(recipe: Recipe, shape: ModelShape) -> list[int]:
    needs = find_basis(recipe.train.basis).needs
    return [sums_bytes(pair, needs) if needs else 0 for pair in shape.linears]


def _backward(recipe: Recipe) -> bool:
    return not find_basis(recipe.train.basis).needs <= {"input_covariance", "input_magnitude"}


def _statistics_hours(recipe: Recipe, shape: ModelShape) -> float:
    """A pass of the model for each group of layers, and the sums in fp32."""
    total = sum(_sums_of_layers(recipe, shape))
    tokens = (recipe.train.statistics_blocks or recipe.data.blocks or 128) * recipe.data.block
    passes = math.ceil(total / SUMS_AT_ONCE) * (3 if _backward(recipe) else 1)
    model = hours(2.0 * tokens * passes * shape.parameters, recipe.train.factor_dtype)
    return model + hours(2.0 * tokens * total / DOUBLE_BYTES, "float32")


def _spectrum_flops(shape: ModelShape) -> float:
    # eigendecomposition 9 k³, Cholesky and triangular solve, three products of the weight's size
    return sum(9.0 * min(m, n) ** 3 + n**3 / 3 + 6.0 * m * n * min(m, n) for m, n in shape.linears)


def _scores_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    train = recipe.train
    factors, tokens = BYTES[train.factor_dtype], _tokens_a_step(recipe)
    saved = factors * shape.components + _saved_by_the_rest(shape, width)
    memory = BASE_DEVICE + width * shape.parameters + factors * shape.full_factors
    memory += tokens * _activations(saved, shape, width, train.checkpoint_activations)
    memory += _logits(tokens, shape, train.logit_chunk, width)
    # θ and d: value, gradient and AdamW's two moments
    return memory + 16 * (shape.components + sum(m for m, _ in shape.linears))


def _scores_flops(recipe: Recipe, shape: ModelShape) -> float:
    train = recipe.train
    trained = train.trains
    passes = 3 if train.checkpoint_activations else 2
    student = shape.full_factors + shape.parameters - shape.selected
    steps = train.steps if trained else train.fisher_blocks
    return 2.0 * steps * _tokens_a_step(recipe) * (shape.parameters * trained + passes * student)


def _tokens_a_step(recipe: Recipe) -> int:
    return recipe.train.batch_tokens if recipe.train.trains else recipe.data.block


def _compensation_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    """Some layers at a time have their factors in fp32 and the Fisher matrices of their scores in memory."""
    tokens, share = recipe.data.block, 1 / _compensation_passes(shape)
    scored = DENSE_BYTES * int(share * (shape.full_factors + tokens * shape.components))
    memory = BASE_DEVICE + width * shape.parameters + scored + min(FISHER_AT_ONCE, _fisher(shape))
    return memory + tokens * _saved_by_the_rest(shape, width) + _logits(tokens, shape, tokens, width)


def _compensation_passes(shape: ModelShape) -> int:
    return math.ceil(_fisher(shape) / FISHER_AT_ONCE)


def _fisher(shape: ModelShape) -> int:
    return sum(DENSE_BYTES * min(pair) ** 2 for pair in shape.linears)


def _compensation_hours(recipe: Recipe, shape: ModelShape) -> float:
    """A pass forward and backward for each group of layers, and their products over all tokens, in fp32."""
    tokens = recipe.refine.compensate.blocks * recipe.data.block
    passes = 2 * 2.0 * tokens * _compensation_passes(shape) * shape.parameters
    return hours(passes, recipe.train.factor_dtype) + hours(2.0 * tokens * _fisher(shape) / DENSE_BYTES, "float32")


def stacked(recipe: Recipe, shape: ModelShape) -> int:
    """Numbers of all factors as they are trained: stacked, whatever the storage."""
    return int(sum(r * (m + n) for r, (m, n) in zip(_ranks(recipe, shape), shape.linears, strict=True)))


def _trained(recipe: Recipe, shape: ModelShape) -> list[tuple[float, float]]:
    """Return the shapes of the matrices that distillation trains: factors, or at full size the rounded weights."""
    if recipe.keep_params == 1 and _trains_dense(recipe):
        return list(shape.linears)
    pairs = zip(_ranks(recipe, shape), shape.linears, strict=True)
    return [matrix for r, (m, n) in pairs for matrix in ((m, r), (r, n))]


def _trains_dense(recipe: Recipe) -> bool:
    rounding = recipe.refine.distill.rounding
    return rounding.weights != "same" and rounding.dense


def _largest_trained(recipe: Recipe, shape: ModelShape) -> int:
    """Numbers of the largest matrix that is trained; where dense weights are, the plan may leave any layer dense."""
    trained = [*_trained(recipe, shape), *(shape.linears if _trains_dense(recipe) else ())]
    return int(max(m * n for m, n in trained))


def _ranks(recipe: Recipe, shape: ModelShape) -> list[float]:
    """Return the rank, not rounded, at which each layer has the recipe's share of m n."""
    form = find_form(recipe.storage)
    return [rank_at(form, recipe.keep_params, m, n) for m, n in shape.linears]


def _distillation_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    settings = recipe.refine.distill
    tokens, kept = settings.batch_tokens, stacked(recipe, shape)
    saved = width * (sum(n for _, n in shape.linears) + shape.components) + _saved_by_the_rest(shape, width)
    # fp32 factors: value, gradient and moments; and copies in the model's dtype, or rounded, while they are needed
    factors = (2 + KEPT_BY[settings.optimiser]) * DENSE_BYTES * kept
    if settings.optimiser == "muon":
        factors += MUON_AT_ONCE * _largest_trained(recipe, shape)
    if settings.rounding.weights != "same":
        factors += ROUNDING_AT_ONCE * _largest_trained(recipe, shape)
    if width < DENSE_BYTES or settings.rounding.weights != "same":
        factors += width * kept // (shape.blocks if settings.checkpoint_activations else 1)
    if settings.held_out_blocks:
        factors += DENSE_BYTES * kept  # the best so far
    learning = factors + tokens * _activations(saved, shape, width, settings.checkpoint_activations)
    dense = width * shape.parameters
    if settings.teacher_top and width < DENSE_BYTES:  # on a GPU: parked once it has answered for every block
        # before the first step it is there beside the factors, moments and best factors of a run that goes on
        learning = max(learning, checkpoint_bytes(recipe, shape) + width * shape.selected)
        dense -= width * shape.selected
    return BASE_DEVICE + dense + learning + _logits(tokens, shape, recipe.train.logit_chunk, width)


def checkpoint_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of what a distillation goes on from: the factors, their moments and the best ones so far."""
    settings = recipe.refine.distill
    return (1 + KEPT_BY[settings.optimiser] + bool(settings.held_out_blocks)) * DENSE_BYTES * stacked(recipe, shape)


def _distillation_flops(recipe: Recipe, shape: ModelShape) -> float:
    settings = recipe.refine.distill
    student = stacked(recipe, shape) + shape.parameters - shape.selected
    passes = 4 if settings.checkpoint_activations else 3
    return 2.0 * settings.steps * settings.batch_tokens * (shape.parameters + passes * student)


def _muon_flops(recipe: Recipe, shape: ModelShape) -> float:
    """FLOPs of a step: five times X ← aX + (bXXᵀ + c(XXᵀ)²)X for each trained matrix X, its shorter side first."""
    sides = (sorted(matrix) for matrix in _trained(recipe, shape))
    return 5 * sum(4.0 * short**2 * long + 2.0 * short**3 for short, long in sides)


def _saved_by_the_rest(shape: ModelShape, width: int) -> int:
    """Bytes a token leaves for the backward pass, Linears apart: norms in fp32, rotations, attention, activation."""
    norms = 2 * shape.hidden * shape.blocks
    return DENSE_BYTES * norms + width * (sum(m for m, _ in shape.linears) + 3 * norms)


def _activations(saved: int, shape: ModelShape, width: int, checkpointed: bool) -> int:
    """Bytes a token holds; checkpointed: the input of each block, and one block whole."""
    if not checkpointed:
        return saved
    return width * shape.hidden * shape.blocks + saved // shape.blocks


def _logits(tokens: int, shape: ModelShape, chunk: int, width: int) -> int:
    """Student, teacher and gradient for all tokens, five fp32 tables for a chunk of them."""
    return shape.vocabulary * (3 * width * tokens + 5 * DENSE_BYTES * min(tokens, chunk))
