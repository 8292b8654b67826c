"""Memory, FLOPs and disk of the distillation of factors."""

from __future__ import annotations

from soco_train.cost import (
    DENSE_BYTES,
    Cost,
    ModelShape,
    Task,
    activations,
    active_student,
    logits,
    ranks,
    saved_by_the_rest,
    stacked,
)
from soco_train.modules.adapters import adapter_numbers

KEPT_BY = {"adamw": 2, "muon": 1}  # numbers that the optimiser keeps for each parameter
# bytes for each number of the matrix whose step Muon takes: the update in fp32; in bf16 three as large, two at most
MUON_AT_ONCE = 4 + 2 * 5
ROUNDING_AT_ONCE = 4 * 4  # and of the matrix that is rounded: four in fp32


def distillation_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    """Return the cost of learning the factors from the dense model, whose pruned layers may be parked on the host."""
    settings = task.refine.distill
    beside = DENSE_BYTES * stacked(task.plan, shape)
    # what it goes on from: what is trained, its moments and the best so far
    checkpoint = (1 + KEPT_BY[settings.optimiser] + bool(settings.held_out_blocks)) * DENSE_BYTES * _learnt(task, shape)
    disk = {"distillation checkpoint": checkpoint}
    if settings.teacher_top:
        beside += width * shape.selected  # parked
        seen = settings.steps * settings.batch_tokens
        disk["remembered predictions"] = 8 * settings.teacher_top * seen  # were every token new
    return Cost(_memory(task, shape, width, checkpoint), beside, _flops(task, shape), disk, "distillation")


def _memory(task: Task, shape: ModelShape, width: int, checkpoint: int) -> int:
    settings = task.refine.distill
    tokens, learning = settings.batch_tokens, _factors(task, shape, width)
    saved = width * shape.met(n + min(m, n) for m, n in shape.linears) + saved_by_the_rest(shape, width)
    learning += _students(task) * tokens * activations(saved, shape, width, settings.checkpoint_activations)
    dense = width * shape.parameters
    if settings.teacher_top and width < DENSE_BYTES:  # on a GPU: parked once it has answered for every block
        # before the first step it is there beside the factors, moments and best factors of a run that goes on
        learning = max(learning, checkpoint + width * shape.selected)
        dense -= width * shape.selected
    return dense + learning + logits(tokens, shape, task.train.logit_chunk, width)


def _factors(task: Task, shape: ModelShape, width: int) -> int:
    """Return the bytes of fp32 factors: value, gradient and moments; and of copies in the model's dtype, or rounded."""
    settings, kept = task.refine.distill, stacked(task.plan, shape)
    largest = _largest_trained(task, shape)
    trained = _learnt(task, shape)
    factors = (2 + KEPT_BY[settings.optimiser]) * DENSE_BYTES * trained
    if settings.adapter.rank:
        factors += DENSE_BYTES * kept  # frozen beside it
    if settings.optimiser == "muon":
        factors += MUON_AT_ONCE * largest
    if settings.rounding.weights != "same":
        factors += ROUNDING_AT_ONCE * largest
    if width < DENSE_BYTES or settings.rounding.weights != "same":
        factors += width * kept // (shape.blocks if settings.checkpoint_activations else 1)
    if settings.held_out_blocks:
        factors += DENSE_BYTES * trained  # the best so far
    return factors


def _learnt(task: Task, shape: ModelShape) -> int:
    """Return how many numbers are trained: the factors, or what is beside them."""
    adapter = task.refine.distill.adapter
    if not adapter.rank:
        return stacked(task.plan, shape)
    pairs = zip(ranks(task.plan, shape), shape.linears, strict=True)
    return int(sum(adapter_numbers(m, n, r, adapter) for r, (m, n) in pairs))


def _flops(task: Task, shape: ModelShape) -> dict[str, float]:
    settings, dtype = task.refine.distill, task.train.factor_dtype
    passes = _students(task) * (4 if settings.checkpoint_activations else 3)
    tokens = 2.0 * settings.steps * settings.batch_tokens
    flops: dict[str, float] = {dtype: tokens * (shape.active + passes * active_student(task.plan, shape))}
    if settings.optimiser == "muon":
        flops["bfloat16"] = flops.get("bfloat16", 0) + settings.steps * _muon_flops(task, shape)
    return flops


def _students(task: Task) -> int:
    """Return how many models each step trains: with `sizes` a smaller one beside the whole."""
    return 2 if task.refine.distill.sizes else 1


def _muon_flops(task: Task, shape: ModelShape) -> float:
    """Return the FLOPs of a step: five times X ← aX + (bXXᵀ + c(XXᵀ)²)X for each trained matrix, shorter side first."""
    sides = (sorted(matrix) for matrix in _trained(task, shape))
    return 5 * sum(4.0 * short**2 * long + 2.0 * short**3 for short, long in sides)


def _trained(task: Task, shape: ModelShape) -> list[tuple[float, float]]:
    """Return the shapes of the matrices that are trained: factors, or at full size the rounded weights."""
    if task.plan.keep_params == 1 and _trains_dense(task):
        return list(shape.linears)
    pairs = zip(ranks(task.plan, shape), shape.linears, strict=True)
    return [matrix for r, (m, n) in pairs for matrix in ((m, r), (r, n))]


def _trains_dense(task: Task) -> bool:
    rounding = task.refine.distill.rounding
    return rounding.weights != "same" and rounding.dense


def _largest_trained(task: Task, shape: ModelShape) -> int:
    """Return the numbers of the largest matrix that is trained; the plan may leave any layer dense."""
    trained = [*_trained(task, shape), *(shape.linears if _trains_dense(task) else ())]
    return int(max(m * n for m, n in trained))
