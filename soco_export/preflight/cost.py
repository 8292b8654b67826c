"""The cost card of a dry run: what a recipe needs before anything is downloaded or started.

`measure` reads the sizes off the architecture (built on torch's meta device: no weights, no network); `estimate` is
arithmetic on those sizes and the recipe. The figures follow what the code holds at one time: a dense model (fp32 on the
CPU, `train.factor_dtype` on a GPU, a few weights on the host beside one), all components P and B in
`train.factor_dtype`, the covariances of one group of layers in float64, activations that autograd saves, logits in
chunks.
"""

from __future__ import annotations

from collections.abc import Mapping

from soco_export.evaluate.settings import CPU
from soco_export.preflight.cost_card import CostCard, Phase
from soco_export.preflight.cost_shape import (
    ASSUMPTION,
    BASE_DEVICE,
    BASE_HOST,
    CORE,
    SUSTAINED,
    WEIGHTS_AT_ONCE,
    host,
    measure,
)
from soco_export.preflight.cost_training import step_costs, training_phases
from soco_export.recipe.recipe import Recipe
from soco_train.cost import BYTES, DENSE_BYTES, ModelShape
from soco_train.scores.registry import find_scorer
from soco_train.settings.rounding import BITS
from soco_train.settings.train import SUMS_AT_ONCE
from soco_train.spectra.statistics import sums_bytes

__all__ = ["ModelShape", "estimate", "measure"]


def estimate(recipe: Recipe, shape: ModelShape, format: str = "onnx") -> CostCard:
    """Return the cost card of a recipe on a model of this shape. Pure."""
    kept = int(recipe.keep_params * shape.selected)
    after = shape.parameters - shape.selected + kept - shape.dropped
    outputs = _outputs(recipe, shape, after)
    phases = (*training_phases(recipe, shape), *_export_phases(recipe, shape, after, format, outputs))
    return CostCard(
        model=recipe.name,
        parameters=shape.parameters,
        selected=shape.selected,
        kept=kept,
        dropped=shape.dropped,
        cached=_cached(recipe, shape),
        layers=len(shape.linears),
        components=shape.components,
        phases=phases,
        disk=_disk(recipe, shape, kept, format, outputs),
        outputs=outputs,
        assumption=f"{ASSUMPTION}; a CPU core at {CORE / 1e9:.0f} GFLOP/s",
        core_hours=_core_hours(recipe, shape, format),
        training_tokens=recipe.train.steps * recipe.train.batch_tokens * find_scorer(recipe.train.scorer).trains,
    )


def _cached(recipe: Recipe, shape: ModelShape) -> tuple[int, int]:
    """Return the bytes of keys and values a token: as the model has them in export.dtype, and as exported."""
    width = BYTES[recipe.export.dtype]
    narrowed = shape.cached - sum(whole - small for whole, small in (value.cached for value in shape.values))
    bits = 8 * width if recipe.export.cache == "same" else BITS[recipe.export.cache]
    return width * shape.cached, bits * narrowed // 8


def _core_hours(recipe: Recipe, shape: ModelShape, format: str) -> float:
    """Return the hours of one CPU core: all in fp32, the three forms that the proof asks too."""
    on_cpu = training_phases(recipe.replace({"train.factor_dtype": "float32"}), shape)
    rates = {"spectrum": SUSTAINED["float64"]}  # the one phase in float64
    training = sum(phase.gpu_hours * rates.get(phase.name, SUSTAINED["float32"]) / CORE for phase in on_cpu)
    tokens = (recipe.evaluation.blocks or 128) * recipe.evaluation.block
    forms = 2 if format == "hf" else 3
    return training + 2.0 * forms * tokens * shape.parameters / CORE / 3600


def _export_phases(
    recipe: Recipe, shape: ModelShape, after: int, format: str, outputs: Mapping[str, int]
) -> list[Phase]:
    checkpoint = host(recipe, shape)
    if recipe.model.weights == "random":  # what is not on disk is put together in memory
        checkpoint += BYTES[recipe.model.dtype] * after
    phases = [Phase("checkpoint", 0, checkpoint, 0.0)]
    if format == "dense":  # every product is in memory when the first is written
        merged = BYTES[recipe.model.dtype] * shape.parameters
        phases.append(Phase("merge", 0, BASE_HOST + merged + WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest, 0.0))
    if format == "onnx":
        export = BASE_HOST + max(WEIGHTS_AT_ONCE * DENSE_BYTES * shape.largest, _calibration(recipe, shape))
        # PyTorch answers in fp32, on a GPU if there is one; the pruned model passes through the host as a whole
        answering, both = DENSE_BYTES * max(shape.parameters, after), outputs["onnx"] + outputs["onnx dense"]
        beside = max(host(recipe, shape), BASE_HOST + DENSE_BYTES * after) + both
        # then ONNX Runtime holds what is timed, the dense model twice if it is its own control
        timed = recipe.bench.enabled * (both + recipe.bench.control * outputs["onnx dense"])
        on_device = answering if recipe.validation.provider == CPU else max(answering, timed)
        proof = Phase("proof", BASE_DEVICE + on_device, beside, 0.0, on_cpu=max(beside, BASE_HOST + answering + both))
        phases += [Phase("export", 0, export, 0.0), proof]
    return phases


def _calibration(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of rounding by a rule that calibrates: the dense model as stored, C of a group of layers, one layer's."""
    rule = recipe.export.rounding()
    if not (rule.calibrates and (recipe.export.grids() or recipe.keep_bytes)):
        return 0
    sums = [sums_bytes(layer, frozenset({"input_covariance"})) for layer in shape.linears]
    working = max(rule.layer_bytes(m, n) for m, n in shape.linears)
    return BYTES[recipe.model.dtype] * shape.parameters + min(sum(sums), max(SUMS_AT_ONCE, *sums)) + working


def _outputs(recipe: Recipe, shape: ModelShape, after: int) -> dict[str, int]:
    """Bytes of what the run makes: the chosen ONNX form first, then what the other forms would take."""
    kinds = {"fp32": 4 * after, "fp16": 2 * after}
    for name in BITS:
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
    bits = BITS[kind] + 16 / recipe.export.quantize.block  # a scale has two bytes
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
    for cost in step_costs(recipe, shape, BYTES[recipe.train.factor_dtype]).values():
        disk |= cost.disk if cost else {}
    disk["hf"] = outputs["hf"]
    if format == "dense":
        disk["dense"] = BYTES[recipe.model.dtype] * shape.parameters
    if format == "onnx":
        disk |= {"onnx": outputs["onnx"], "onnx dense": outputs["onnx dense"]}
    return disk
