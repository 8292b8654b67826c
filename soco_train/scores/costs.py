"""Memory and FLOPs of scorers that run the model with all components in place of its layers."""

from __future__ import annotations

from soco_train.cost import BYTES, Cost, ModelShape, Task, activations, logits, saved_by_the_rest


def learning_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    """Return the cost of learning scores: a dense model that teaches, forward and backward through all components.

    With `lr_factors` the components have gradients and AdamW's two moments too, and each layer's input is kept.
    """
    train = task.train
    passes = 2 + train.checkpoint_activations + (train.lr_factors > 0)
    done = 2.0 * train.steps * train.batch_tokens * (shape.active + passes * shape.active_factors)
    memory = _memory(task, shape, width, train.batch_tokens, train.checkpoint_activations)
    # P and B as they were learnt, and a checkpoint of them and their moments
    disk = {"components": 16 * shape.full_factors} if train.lr_factors else {}
    return Cost(memory, flops={train.factor_dtype: done}, disk=disk)


def saliency_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    """Return the cost of one pass forward and backward over `fisher_blocks` sequences."""
    done = 2.0 * task.train.fisher_blocks * task.data.block * 2 * shape.active_factors
    return Cost(_memory(task, shape, width, task.data.block, False), flops={task.train.factor_dtype: done})


def _memory(task: Task, shape: ModelShape, width: int, tokens: int, checkpointed: bool) -> int:
    factors, learning = BYTES[task.train.factor_dtype], task.train.lr_factors > 0
    kept = shape.met((2 * min(m, n) + n if learning else min(m, n)) for m, n in shape.linears)
    saved = factors * kept + saved_by_the_rest(shape, width)
    memory = width * shape.parameters + (4 if learning else 1) * factors * shape.full_factors
    memory += tokens * activations(saved, shape, width, checkpointed)
    memory += logits(tokens, shape, task.train.logit_chunk, width)
    # θ and d: value, gradient and AdamW's two moments
    return memory + 16 * (shape.components + sum(m for m, _ in shape.linears))
