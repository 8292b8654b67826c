"""The cost card of a dry run: what a recipe needs before anything is downloaded or started.

`measure` reads the sizes off the architecture (built on torch's meta device: no weights, no network); `estimate` is
arithmetic on those sizes and the recipe. The figures follow what the code holds at one time: a dense model (fp32 on the
CPU, `train.factor_dtype` on a GPU, a few weights on the host beside one), all components P and B in
`train.factor_dtype`, the covariances of one group of layers in float64, activations that autograd saves, logits in
chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from soco_export.cost_card import CostCard, Phase
from soco_export.recipe import Recipe
from soco_train.spectrum import find_basis
from soco_train.statistics import SUMS_AT_ONCE, sums_bytes

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DENSE_BYTES = 4
DOUBLE_BYTES = 8
# one scale (fp32) for each block of weights
QUANTISED_BITS = {"int8": 8, "int4": 4}
# interpreter, torch and ONNX Runtime before any weight
BASE_HOST = 900 * 2**20
BASE_DEVICE = 600 * 2**20
# sustained FLOP/s of one H100 (SXM): 40 % of 989 TFLOP/s dense bf16, 60 % of 67 TFLOP/s fp32; eigh in float64 is slow
SUSTAINED = {"bfloat16": 0.4 * 989e12, "float32": 0.6 * 67e12, "float64": 2e12}
ASSUMPTION = "one H100: bf16 at 40 % of 989 TFLOP/s, fp32 at 60 % of 67 TFLOP/s, eigendecomposition at 2 TFLOP/s"
STATISTICS_TOKENS_AT_ONCE = 2048
# where the host streams weights, in fp32: as read, as computed, as written, and the one before; measured: 1.9 to 3.1
WEIGHTS_AT_ONCE = 4


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense model that cost anything. linears: (m, n) of every participating layer."""

    parameters: int
    embedding: int
    tied: bool
    hidden: int
    vocabulary: int
    blocks: int
    linears: tuple[tuple[int, int], ...]

    @property
    def largest(self) -> int:
        """Numbers of the largest weight."""
        return max(self.embedding, *(m * n for m, n in self.linears))

    @property
    def selected(self) -> int:
        """Parameters of the participating layers."""
        return sum(m * n for m, n in self.linears)

    @property
    def components(self) -> int:
        """Singular components, hence scores."""
        return sum(min(m, n) for m, n in self.linears)

    @property
    def full_factors(self) -> int:
        """Numbers in P and B of all components."""
        return sum(min(m, n) * (m + n) for m, n in self.linears)


def measure(recipe: Recipe) -> ModelShape:
    """Return the sizes of the recipe's dense model without its weights.

    Raises RecipeError if transformers does not know the architecture or no layer takes part.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from soco_export.models import dense_config
    from soco_train.layers import select_linears

    config = dense_config(recipe)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    linears = select_linears(model, recipe.layers)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return ModelShape(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        embedding=embedding.numel(),
        tied=head is embedding,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        blocks=config.num_hidden_layers,
        linears=tuple((linear.out_features, linear.in_features) for linear in linears.values()),
    )


def estimate(recipe: Recipe, shape: ModelShape, format: str = "onnx") -> CostCard:
    """Return the cost card of a recipe on a model of this shape. Pure."""
    kept = int(recipe.keep_params * shape.selected)
    after = shape.parameters - shape.selected + kept
    outputs = _outputs(recipe, shape, after)
    phases = (*_training_phases(recipe, shape), *_export_phases(recipe, shape, after, format, outputs))
    return CostCard(
        model=recipe.name,
        parameters=shape.parameters,
        selected=shape.selected,
        kept=kept,
        layers=len(shape.linears),
        components=shape.components,
        phases=phases,
        disk=_disk(recipe, shape, kept, format, outputs),
        outputs=outputs,
        assumption=ASSUMPTION,
        training_tokens=recipe.train.steps * recipe.train.batch_tokens if recipe.train.trains else 0,
    )


def _training_phases(recipe: Recipe, shape: ModelShape) -> list[Phase]:
    """Peak memory where it trains depends on the bytes of a weight there: fp32 on the CPU, train.factor_dtype on a GPU.

    Beside a GPU the host holds what is on its way there.
    """
    host = _host(recipe, shape)
    width = BYTES[recipe.train.factor_dtype]

    def phase(name: str, memory: Callable[[Recipe, ModelShape, int], int], hours: float, beside: int = 0) -> Phase:
        return Phase(name, memory(recipe, shape, width), host + beside, hours, memory(recipe, shape, DENSE_BYTES))

    phases = [
        phase("statistics", _statistics_memory, _statistics_hours(recipe, shape)),
        phase("spectrum", _spectrum_memory, _hours(_spectrum_flops(shape), "float64")),
        Phase("scores", 0, BASE_HOST, 0.0)
        if recipe.train.scorer == "singular-values"
        else phase("scores", _scores_memory, _hours(_scores_flops(recipe, shape), recipe.train.factor_dtype)),
    ]
    if recipe.refine.distill.steps:
        hours = _hours(_distillation_flops(recipe, shape), recipe.train.factor_dtype)
        beside = DENSE_BYTES * _stacked(recipe, shape)
        if recipe.refine.distill.teacher_top:
            beside += width * shape.selected  # parked
        phases.append(phase("distillation", _distillation_memory, hours, beside))
    else:
        cut = _cut_memory(recipe, shape)
        device, alone = (BASE_DEVICE + size * shape.parameters for size in (width, DENSE_BYTES))
        if recipe.refine.refit.blocks:  # holds them all, where it fits them and when they are fitted
            cut, device, alone = (part + DENSE_BYTES * _stacked(recipe, shape) for part in (cut, device, alone))
        phases.append(Phase("factors", device, max(host, BASE_HOST + cut), 0.0, on_cpu=alone + cut))
    return phases


def _cut_memory(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of the layer that takes most.

    Its spectrum in fp32, and what survives, [m, r] and [r, n], in float64 twice and in fp32 with that of the layer
    before; or, while pivots are chosen, about seven float64 arrays of [m, r] beside those in fp32.
    """

    def one(m: int, n: int, r: float) -> float:
        survivors = r * (m + n)
        cut = DENSE_BYTES * min(m, n) * (m + n) + 2 * (DOUBLE_BYTES + DENSE_BYTES) * survivors
        pivoted = recipe.storage == "pivoted"
        return max(cut, 2 * DENSE_BYTES * survivors + 7 * DOUBLE_BYTES * m * r if pivoted else 0)

    return int(max(one(m, n, r) for (m, n), r in zip(shape.linears, _ranks(recipe, shape), strict=True)))


def _host(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of a host that passes weights on: a few at a time, for all others are pages of their files.

    Random weights have no file.
    """
    model = DENSE_BYTES * shape.parameters if recipe.model.weights == "random" else 0
    return BASE_HOST + model + WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest


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
    model = _hours(2.0 * tokens * passes * shape.parameters, recipe.train.factor_dtype)
    return model + _hours(2.0 * tokens * total / DOUBLE_BYTES, "float32")


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


def _stacked(recipe: Recipe, shape: ModelShape) -> int:
    """Numbers of all factors as they are trained: stacked, whatever the storage."""
    return int(sum(r * (m + n) for r, (m, n) in zip(_ranks(recipe, shape), shape.linears, strict=True)))


def _ranks(recipe: Recipe, shape: ModelShape) -> list[float]:
    """Return the rank at which each layer's storage, r(m + n) or r(m + n - r), has the recipe's share of m n."""
    keep = recipe.keep_params
    if recipe.storage == "stacked":
        return [keep * m * n / (m + n) for m, n in shape.linears]
    return [((m + n) - math.sqrt((m + n) ** 2 - 4 * keep * m * n)) / 2 for m, n in shape.linears]


def _distillation_memory(recipe: Recipe, shape: ModelShape, width: int) -> int:
    settings = recipe.refine.distill
    tokens, kept = settings.batch_tokens, _stacked(recipe, shape)
    saved = width * (sum(n for _, n in shape.linears) + shape.components) + _saved_by_the_rest(shape, width)
    # fp32 factors: value, gradient and AdamW's two moments; and copies in the model's dtype, while they are needed
    factors = 16 * kept
    if width < DENSE_BYTES:
        factors += width * kept // (shape.blocks if settings.checkpoint_activations else 1)
    if settings.held_out_blocks:
        factors += DENSE_BYTES * kept  # the best so far
    learning = factors + tokens * _activations(saved, shape, width, settings.checkpoint_activations)
    dense = width * shape.parameters
    if settings.teacher_top and width < DENSE_BYTES:  # on a GPU: parked once it has answered for every block
        # before the first step it is there beside the factors, moments and best factors of a run that goes on
        copies = 4 if settings.held_out_blocks else 3
        learning = max(learning, copies * DENSE_BYTES * kept + width * shape.selected)
        dense -= width * shape.selected
    return BASE_DEVICE + dense + learning + _logits(tokens, shape, recipe.train.logit_chunk, width)


def _distillation_flops(recipe: Recipe, shape: ModelShape) -> float:
    settings = recipe.refine.distill
    student = _stacked(recipe, shape) + shape.parameters - shape.selected
    passes = 4 if settings.checkpoint_activations else 3
    return 2.0 * settings.steps * settings.batch_tokens * (shape.parameters + passes * student)


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


def _export_phases(
    recipe: Recipe, shape: ModelShape, after: int, format: str, outputs: Mapping[str, int]
) -> list[Phase]:
    checkpoint = _host(recipe, shape)
    if recipe.model.weights == "random":  # what is not on disk is put together in memory
        checkpoint += BYTES[recipe.model.dtype] * after
    phases = [Phase("checkpoint", 0, checkpoint, 0.0)]
    if format == "dense":  # every product is in memory when the first is written
        merged = BYTES[recipe.model.dtype] * shape.parameters
        phases.append(Phase("merge", 0, BASE_HOST + merged + WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest, 0.0))
    if format == "onnx":
        export = BASE_HOST + WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest
        # PyTorch answers in fp32, on a GPU if there is one; the pruned model passes through the host as a whole
        answering, both = DENSE_BYTES * max(shape.parameters, after), outputs["onnx"] + outputs["onnx dense"]
        beside = max(_host(recipe, shape), BASE_HOST + DENSE_BYTES * after) + both
        proof = Phase("proof", BASE_DEVICE + answering, beside, 0.0, on_cpu=BASE_HOST + answering + both)
        phases += [Phase("export", 0, export, 0.0), proof]
    return phases


def _outputs(recipe: Recipe, shape: ModelShape, after: int) -> dict[str, int]:
    """Bytes of what the run makes: the chosen ONNX form first, then what the other forms would take."""
    kinds = {"fp32": 4 * after, "fp16": 2 * after}
    for name in QUANTISED_BITS:
        kinds[name] = _quantised(recipe, shape, after, name)
    weights = recipe.export.weights
    same = BYTES[recipe.export.dtype]
    chosen = same * after if weights == "same" else kinds[weights]
    dense = same * shape.parameters if weights == "same" else _quantised(recipe, shape, shape.parameters, weights)
    others = {f"onnx in {name}": value for name, value in kinds.items()}
    return {"hf": BYTES[recipe.model.dtype] * after, "onnx": chosen, "onnx dense": dense, **others}


def _quantised(recipe: Recipe, shape: ModelShape, parameters: int, kind: str) -> int:
    """The input embedding stays in `export.dtype`; every MatMul is blocks of integers with a scale each."""
    width = BYTES[recipe.export.dtype]
    multiplied = parameters if shape.tied else parameters - shape.embedding
    bits = QUANTISED_BITS[kind] + 8 * width / recipe.export.quantize.block
    return int(width * shape.embedding + multiplied * bits / 8)


def _disk(recipe: Recipe, shape: ModelShape, kept: int, format: str, outputs: Mapping[str, int]) -> dict[str, int]:
    """Bytes of the run folder by what is in it, the model itself (if it is not here yet) not counted."""
    deviations = sum(m for m, _ in shape.linears)
    disk = {
        "spectrum": 4 * (shape.full_factors + shape.components),
        # the scores, and a checkpoint of θ, d and AdamW's moments
        "scores": 4 * (5 * shape.components + 4 * deviations),
        "factors": 4 * kept,
    }
    if recipe.refine.distill.steps:
        copies = 4 if recipe.refine.distill.held_out_blocks else 3
        disk["distillation checkpoint"] = copies * DENSE_BYTES * _stacked(recipe, shape)
        if recipe.refine.distill.teacher_top:
            seen = recipe.refine.distill.steps * recipe.refine.distill.batch_tokens
            disk["remembered predictions"] = 8 * recipe.refine.distill.teacher_top * seen  # were every token new
    disk["hf"] = outputs["hf"]
    if format == "dense":
        disk["dense"] = BYTES[recipe.model.dtype] * shape.parameters
    if format == "onnx":
        disk |= {"onnx": outputs["onnx"], "onnx dense": outputs["onnx dense"]}
    return disk


def _hours(flops: float, dtype: str) -> float:
    return flops / SUSTAINED[dtype] / 3600
