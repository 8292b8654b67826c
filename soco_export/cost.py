"""The cost card of a dry run: what a recipe needs before anything is downloaded or started.

`measure` reads the sizes off the architecture (built on torch's meta device: no weights, no network); `estimate` is
arithmetic on those sizes and the recipe. The figures follow what the code holds at one time: a dense model in fp32, all
components P and B in `train.factor_dtype`, covariances in float64, activations that autograd saves, logits in chunks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from soco_export.cost_card import CostCard, Phase
from soco_export.recipe import Recipe

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
    phases = (*_training_phases(recipe, shape, kept), *_export_phases(recipe, shape, after, format, outputs))
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
        training_tokens=recipe.train.steps * recipe.train.batch_tokens if recipe.train.scorer == "soco" else 0,
    )


def _training_phases(recipe: Recipe, shape: ModelShape, kept: int) -> list[Phase]:
    dense = DENSE_BYTES * shape.parameters
    host = BASE_HOST + dense
    covariances = _statistics_bytes(recipe, shape)
    # a layer's covariance with its factor and inverse, and the weight in three forms, all float64
    working = max(DOUBLE_BYTES * (4 * n * n + 4 * m * n) for m, n in shape.linears)
    batch = STATISTICS_TOKENS_AT_ONCE
    phases = [
        Phase(
            "statistics",
            BASE_DEVICE + dense + covariances + batch * DENSE_BYTES * 4 * max(max(pair) for pair in shape.linears),
            host,
            _hours(_statistics_flops(recipe, shape), "float32"),
        ),
        Phase("spectrum", BASE_DEVICE + dense + covariances + working, host, _hours(_spectrum_flops(shape), "float64")),
        _scores_phase(recipe, shape, dense, host),
    ]
    if recipe.refine.distill.steps:
        phases.append(_distillation_phase(recipe, shape, kept, dense, host))
    return phases


def _statistics_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Covariances of all layers at one time, each with its own; layers that read the same input need less."""
    inputs = sum(n * n for _, n in shape.linears) if recipe.train.basis in ("whitened", "two-sided") else 0
    outputs = sum(m * m for m, _ in shape.linears) if recipe.train.basis == "two-sided" else 0
    return DOUBLE_BYTES * (inputs + outputs)


def _statistics_flops(recipe: Recipe, shape: ModelShape) -> float:
    if recipe.train.basis == "plain":
        return 0.0
    blocks = recipe.train.statistics_blocks or recipe.data.blocks or 128
    return blocks * recipe.data.block * (2.0 * shape.parameters + 2 * sum(n * n for _, n in shape.linears))


def _spectrum_flops(shape: ModelShape) -> float:
    # eigendecomposition 9 k³, Cholesky and triangular solve, three products of the weight's size
    return sum(9.0 * min(m, n) ** 3 + n**3 / 3 + 6.0 * m * n * min(m, n) for m, n in shape.linears)


def _scores_phase(recipe: Recipe, shape: ModelShape, dense: int, host: int) -> Phase:
    train = recipe.train
    trained = train.scorer == "soco"
    width = BYTES[train.factor_dtype]
    tokens = train.batch_tokens if trained else recipe.data.block
    if train.scorer == "singular-values":
        return Phase("scores", 0, BASE_HOST, 0.0)
    saved = width * shape.components + DENSE_BYTES * _saved_by_the_rest(shape)
    memory = BASE_DEVICE + dense + width * shape.full_factors
    memory += tokens * _activations(saved, shape, train.checkpoint_activations)
    memory += _logits(tokens, shape, train.logit_chunk)
    # θ and d: value, gradient and AdamW's two moments
    memory += 16 * (shape.components + sum(m for m, _ in shape.linears))
    passes = 3 if train.checkpoint_activations else 2
    student = shape.full_factors + shape.parameters - shape.selected
    steps = train.steps if trained else train.fisher_blocks
    flops = 2.0 * steps * tokens * (shape.parameters * trained + passes * student)
    return Phase("scores", memory, host, _hours(flops, train.factor_dtype))


def _distillation_phase(recipe: Recipe, shape: ModelShape, kept: int, dense: int, host: int) -> Phase:
    settings = recipe.refine.distill
    tokens = settings.batch_tokens
    saved = DENSE_BYTES * (sum(n for _, n in shape.linears) + shape.components + _saved_by_the_rest(shape))
    # fp32 factors: value, gradient and AdamW's two moments
    memory = BASE_DEVICE + dense + 16 * kept + _logits(tokens, shape, recipe.train.logit_chunk)
    memory += tokens * _activations(saved, shape, checkpointed=False)
    student = kept + shape.parameters - shape.selected
    flops = 2.0 * settings.steps * tokens * (shape.parameters + 3 * student)
    return Phase("distillation", memory, host + DENSE_BYTES * kept, _hours(flops, "float32"))


def _saved_by_the_rest(shape: ModelShape) -> int:
    """Numbers a token leaves for the backward pass outside the Linears: norms, rotations, attention, activation."""
    return sum(m for m, _ in shape.linears) + 8 * shape.hidden * shape.blocks


def _activations(saved: int, shape: ModelShape, checkpointed: bool) -> int:
    """Bytes a token holds; checkpointed: the input of each block, and one block whole."""
    if not checkpointed:
        return saved
    return DENSE_BYTES * shape.hidden * shape.blocks + saved // shape.blocks


def _logits(tokens: int, shape: ModelShape, chunk: int) -> int:
    """Student, teacher and gradient for all tokens, five fp32 tables for a chunk of them."""
    return DENSE_BYTES * shape.vocabulary * (3 * tokens + 5 * min(tokens, chunk))


def _export_phases(
    recipe: Recipe, shape: ModelShape, after: int, format: str, outputs: Mapping[str, int]
) -> list[Phase]:
    checkpoint = BASE_HOST + DENSE_BYTES * shape.parameters + BYTES[recipe.model.dtype] * after
    phases = [Phase("checkpoint", 0, checkpoint, 0.0)]
    if format == "onnx":
        # weights are streamed: one of them at a time, beside its converted copy
        largest = max(shape.embedding, *(m * n for m, n in shape.linears))
        export = BASE_HOST + 3 * DENSE_BYTES * largest
        proof = BASE_HOST + outputs["onnx"] + DENSE_BYTES * max(shape.parameters, after) + outputs["onnx dense"]
        phases += [Phase("export", 0, export, 0.0), Phase("proof", 0, proof, 0.0)]
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
        disk["distillation checkpoint"] = 12 * kept
    disk["hf"] = outputs["hf"]
    if format == "dense":
        disk["dense"] = BYTES[recipe.model.dtype] * shape.parameters
    if format == "onnx":
        disk |= {"onnx": outputs["onnx"], "onnx dense": outputs["onnx dense"]}
    return disk


def _hours(flops: float, dtype: str) -> float:
    return flops / SUSTAINED[dtype] / 3600
