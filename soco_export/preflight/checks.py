"""Everything that can be wrong, found before a weight is loaded or a file is written.

`check_everything` is what a run calls. The questions are separate functions: those about the recipe read nothing, those
about its inputs (inputs.py) headers and texts, those about the machine (machine.py) what is installed and free.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.evaluate.settings import CPU
from soco_export.preflight.cost import estimate, measure
from soco_export.preflight.inputs import (
    check_choices,
    check_depth,
    check_held_out,
    check_lengths,
    check_mixture,
    check_plan,
    check_rounded_layers,
    check_stack,
    check_tasks,
    check_weights,
)
from soco_export.preflight.machine import bytes_in, check_onnxruntime, check_room, look
from soco_export.recipe.recipe import Recipe
from soco_train.cost import ModelShape
from soco_train.errors import RecipeError
from soco_train.settings.refine import HEAD_STEP
from soco_train.settings.rounding import BITS

if TYPE_CHECKING:
    from soco_export.onnx.describe.architecture import Architecture


def check_everything(recipe: Recipe, root: Path, format: str) -> None:
    """Raise the first thing that would stop a run of `recipe` in `root`; RecipeError, DataError or MachineError."""
    from soco_export.model.load import check_model
    from soco_export.runtimes.registry import check_opens

    check_recipe(recipe, format)
    if format == "onnx":
        check_onnxruntime(recipe)
        check_opens(recipe.validation.runtime)
    check_depth(recipe)
    # room first: checking a model of the hub downloads it
    shape = measure(recipe)
    check_shape(recipe, shape)
    check_tasks(recipe)
    check_room(estimate(recipe, shape, format), look(root), already=bytes_in(root))
    tokenizer = check_model(recipe)
    check_texts(recipe, tokenizer)
    check_choices(recipe, tokenizer, shape.context)
    if format == "onnx":
        check_dense_export(recipe)
    if not root.exists():  # a run that goes on has read its weights
        check_weights(recipe, format)


def check_shape(recipe: Recipe, shape: ModelShape) -> None:
    """Raise RecipeError for what a model of this `shape` cannot be asked for; a dry run asks this too. Pure."""
    check_plan(recipe, shape)
    check_mixture(recipe, shape)
    check_lengths(recipe, shape.context)


def check_recipe(recipe: Recipe, format: str) -> None:
    """Raise RecipeError for settings that contradict each other, whatever the machine; a dry run asks this too."""
    rounding, steps = recipe.refine.distill.rounding, recipe.refine.distill.steps
    if rounding.weights != "same" and not steps:
        raise RecipeError(
            f"refine.distill.rounding.weights is {rounding.weights}, but nothing is distilled",
            fix="set refine.distill.steps, or refine.distill.rounding.weights: same",
            where="recipe: refine.distill.steps",
        )
    check_steps(recipe)
    check_stack(recipe)
    check_rounded_layers(recipe)
    if recipe.keep_bytes is not None:
        check_bytes(recipe)
    if format == "onnx":
        check_quantisation(recipe)
        check_precision(recipe)
        check_graph(recipe)
    if format == "dense":
        check_biases(recipe)


def check_steps(recipe: Recipe) -> None:
    """Raise RecipeError for a basis that is none, and for what the scorer or a rung that is asked for cannot do."""
    from soco_train.refine.rungs import wanted_rungs
    from soco_train.scores.registry import find_scorer
    from soco_train.spectra.bases import find_basis

    _check_planned_values(recipe)
    find_basis(recipe.train.basis)
    find_scorer(recipe.train.scorer).check(recipe.train, recipe.plan)
    for rung in wanted_rungs(recipe.refine):
        rung.check(recipe.refine.of_step(rung.name), recipe.storage)


def _check_planned_values(recipe: Recipe) -> None:
    """Raise RecipeError where fewer numbers a value head cannot be weighed against ranks, or are given by name."""
    if recipe.refine.values.each:
        raise RecipeError(
            "refine.values.each is what a plan fills in, and a recipe does not choose it",
            fix="leave it out, with refine.values.keep: planned",
            where="recipe: refine.values.each",
        )
    needed = {
        "train.scorer": (recipe.train.scorer, "singular-values"),
        "train.basis": (recipe.train.basis, "two-sided"),
        "allocation": (recipe.allocation, "lagrangian"),
    }
    others = {key: value for key, (found, value) in needed.items() if found != value}
    if recipe.refine.values.planned and others:
        asked = " and ".join(f"{key}: {value}" for key, value in others.items())
        raise RecipeError(
            "refine.values.keep: planned weighs errors of values against those of the two-sided basis, as they are",
            fix=f"{asked}, or a share for refine.values.keep",
            where="recipe: refine.values.keep",
        )


def check_bytes(recipe: Recipe) -> None:
    """Raise RecipeError where bytes cannot be the budget: of the model's graph, or beside another setting."""
    from soco_export.model.file_bytes import BLOCK_SIZES, FileBytes
    from soco_train.numbers.blocks import Grid

    assert recipe.keep_bytes is not None
    against = {
        "optimise_for: latency": recipe.optimise_for == "latency",
        "refine.values": recipe.refine.values.narrows,
        "refine.distill.rounding.weights": recipe.refine.distill.rounding.weights not in ("same", "planned"),
    }
    for other in (other for other, there in against.items() if there):
        raise RecipeError(
            f"keep_bytes chooses each layer's size and type by itself, which {other} does not know",
            fix=f"give keep_params with it, or leave {other.partition(':')[0]} as it is by default",
            where="recipe: keep_bytes",
        )
    rule, symmetric = recipe.export.rounding(), recipe.export.quantize.symmetric
    for weights, block in product(BITS, BLOCK_SIZES):  # any layer may get any of them
        rule.check(Grid(BITS[weights], block, symmetric))
    FileBytes(recipe).check(recipe.keep_bytes)


def check_quantisation(recipe: Recipe) -> None:
    """Raise RecipeError if the export would round what was trained where or how it was not trained to be rounded.

    What it rounds less than that is no worse for it.
    """
    trained, how, weights = recipe.refine.distill.rounding, recipe.export.quantize, recipe.export.weights
    planned = trained.weights == "planned"  # each layer in its own type and block, those that it is exported in
    if planned:
        _check_planned(recipe)
    elif "same" in (trained.weights, weights):
        return
    if how.rule != trained.rule:
        raise RecipeError(
            f"the layers are trained to be rounded by the rule {trained.rule}, and export.quantize.rule is {how.rule}",
            fix=f"export.quantize.rule: {trained.rule}, or refine.distill.rounding.weights: same",
            where="recipe: export.quantize.rule",
        )
    differences = {
        "weights": not planned and BITS[weights] < BITS[trained.weights],
        "block": weights == trained.weights and how.block != trained.block,
        "symmetric": (planned or weights == trained.weights) and how.symmetric != trained.symmetric,
        "keep": not set(trained.keep) <= set(how.keep),
    }
    for key in (key for key, differs in differences.items() if differs):
        exported = f"export.{key}" if key == "weights" else f"export.quantize.{key}"
        raise RecipeError(
            f"the layers are trained for another rounding than {exported}: refine.distill.rounding.{key} differs",
            fix="give both the same value and distil so, or round them as they are: soco-export export RUN/hf",
            where=f"recipe: {exported}",
        )


def _check_planned(recipe: Recipe) -> None:
    if recipe.keep_bytes is None:
        raise RecipeError(
            "refine.distill.rounding.weights is planned, and only a plan for bytes chooses types",
            fix=f"give keep_bytes, or refine.distill.rounding.weights: {' or '.join(BITS)}",
            where="recipe: refine.distill.rounding.weights",
        )


def check_precision(recipe: Recipe) -> None:
    """Raise RecipeError for a dtype that the provider lacks kernels for: half precision on the CPU, or the reverse."""
    dtype, provider = recipe.export.dtype, recipe.validation.provider
    if provider == "CUDAExecutionProvider" and dtype == "float32" and recipe.export.flavour == "contrib":
        raise RecipeError(
            f"export.flavour is contrib, whose GroupQueryAttention {provider} has in half precision only",
            fix="export.dtype: float16 or bfloat16, or export.flavour: standard",
            where="recipe: export.flavour",
        )
    asked = recipe.validation.runtime == "ort" or recipe.bench.enabled
    if asked and provider == CPU and dtype != "float32":
        raise RecipeError(
            f"export.dtype is {dtype}, but {CPU} runs that unfused and slowly, or not at all",
            fix="export.dtype: float32 (and weights: int8 to save memory), or validate.provider: CUDAExecutionProvider",
            where="recipe: export.dtype",
        )


def check_graph(recipe: Recipe) -> None:
    """Raise RecipeError for an architecture, flavour, type or layout that the export would refuse after training."""
    from soco_export.model.load import dense_config
    from soco_export.onnx.check import check_architecture
    from soco_export.onnx.describe.config import as_config
    from soco_export.onnx.emit.linear import find_finish
    from soco_export.runtimes.registry import check_cache, check_runtimes

    find_finish(recipe.storage)
    config = as_config(dense_config(recipe), where=f"model {recipe.name}")
    architecture = check_architecture(config, recipe.export)
    if recipe.refine.values.narrows:
        architecture = _narrowed(recipe, architecture)
    check_runtimes(recipe.export, architecture)
    check_cache(recipe.validation.runtime, "validate.runtime", recipe.export, architecture)


def _narrowed(recipe: Recipe, architecture: Architecture | None) -> Architecture:
    """Return the description as `refine.values` makes it; RecipeError where graph or runtime cannot cache so."""
    from soco_export.onnx.narrow import all_narrowed, check_values

    if architecture is None:
        raise RecipeError(
            "the graph of this model is traced, and caches values as transformers does: refine.values saves nothing",
            fix="leave out refine.values, or describe the model in soco_export/onnx/families",
            where="recipe: refine.values.keep",
        )
    values = recipe.refine.values
    numbers = HEAD_STEP if values.planned else values.numbers(architecture.attention.head_dim)
    narrowed = all_narrowed(architecture, numbers)
    check_values(narrowed, recipe.export)
    return narrowed


def check_dense_export(recipe: Recipe) -> None:
    """Raise what the export of the dense model, which a graph is measured against, would raise after training."""
    from soco_export.export import open_folder
    from soco_export.model.source import fetch_folder

    if recipe.model.weights != "random":
        open_folder(fetch_folder(recipe), recipe.export, recipe.model.trust_remote_code)


def check_biases(recipe: Recipe) -> None:
    """Raise RecipeError if training would give layers a bias that the merged dense form has no place for."""
    from soco_export.checkpoint.biases import check_bias_places
    from soco_export.model.load import dense_skeleton
    from soco_train.modules.sites import open_sites
    from soco_train.modules.values import ranked_linears
    from soco_train.scores.registry import find_scorer

    if not find_scorer(recipe.train.scorer).deviates(recipe.train):
        return
    model = dense_skeleton(recipe)
    open_sites(model)
    check_bias_places(model, [f"{name}.bias" for name in ranked_linears(model, recipe.layers, recipe.refine.values)])


def check_texts(recipe: Recipe, tokenizer: object) -> None:
    """Raise RecipeError or DataError for a text that is missing, not UTF-8, or shorter than one block.

    Of a hub data set only the address is checked: it is downloaded when it is needed.
    """
    from soco_train.data.corpus import check_source, load_blocks

    check_source(recipe.data, "calibration")
    check_source(recipe.evaluation, "evaluation")
    if recipe.data.hub is None:
        check_held_out(recipe, len(load_blocks(tokenizer, recipe.data, "calibration").tokens))
    if recipe.evaluation.hub is None:
        load_blocks(tokenizer, recipe.evaluation, "evaluation")
