"""What recipe, config.json and headers say together: asked before a weight is read, so that no training is lost."""

from __future__ import annotations

from fractions import Fraction
from glob import escape
from typing import TYPE_CHECKING, Any

from soco_export.onnx.settings import ExportSettings, check_named
from soco_export.recipe.recipe import Recipe
from soco_train.errors import DataError, RecipeError
from soco_train.settings.rounding import BITS

if TYPE_CHECKING:
    from soco_train.cost import ModelShape


def check_plan(recipe: Recipe, shape: ModelShape) -> None:
    """Raise RecipeError if the budget is below the smallest rank (or `multiple`) of all layers. Pure.

    Of a budget in bytes `check_bytes` asks the same.
    """
    if recipe.keep_bytes is not None:
        return
    from soco_train.plan.allocation import make_ladder, refuse_impossible, uniform_ranks
    from soco_train.scores.registry import find_scorer

    biased = find_scorer(recipe.train.scorer).deviates(recipe.train)
    ladders = [make_ladder((m, n), recipe.plan, m if biased else 0, None) for m, n in shape.linears]
    keep = Fraction(str(recipe.keep_params))
    if recipe.allocation == "uniform":
        uniform_ranks(ladders, keep)
    else:
        refuse_impossible(ladders, keep)


def check_lengths(recipe: Recipe, context: int | None) -> None:
    """Raise RecipeError for blocks of text longer than the model's `context` (in tokens; None: unlimited).

    So is a proof refused that would go on from nothing: as many steps as a block or the context has tokens. Pure.
    """
    blocks = {"data.block": recipe.data.block, "evaluation.block": recipe.evaluation.block}
    for key, block in blocks.items():
        if context is not None and block > context:
            raise RecipeError(
                f"{key} is {block} tokens, and the model has positions for {context}",
                fix=f"{key}: {context}, or less",
                where=f"recipe: {key}",
            )
    parity = recipe.validation.parity
    steps = {"decode_steps": recipe.evaluation.block} | ({"greedy_tokens": context} if parity.greedy_prompts else {})
    for key, room in steps.items():
        if room is not None and getattr(parity, key) >= room:
            said = "evaluation.block is" if key == "decode_steps" else "the model has positions for"
            raise RecipeError(
                f"validate.parity.{key} is {getattr(parity, key)}, and {said} {room}: no token is left to start from",
                fix=f"validate.parity.{key}: {room - 1}, or less",
                where=f"recipe: validate.parity.{key}",
            )


def check_mixture(recipe: Recipe, shape: ModelShape) -> None:
    """Raise RecipeError if experts are to be refitted: token by token they read other inputs once others are pruned."""
    if recipe.refine.refit.blocks and any(share < 1 for share in shape.shares):
        raise RecipeError(
            "refine.refit fits a layer to the same tokens in the dense and in the pruned model, and a mixture may send "
            "them to different experts",
            fix="refine.refit.blocks: 0, or exclude the experts: layers.exclude",
            where="recipe: refine.refit.blocks",
        )


def check_held_out(recipe: Recipe, blocks: int) -> None:
    """Raise RecipeError if distillation would hold out all of the `blocks` calibration blocks. Pure."""
    held = recipe.refine.distill.held_out_blocks
    if recipe.refine.distill.steps and held >= blocks:
        raise RecipeError(
            f"refine.distill.held_out_blocks is {held}, and there are {blocks} calibration blocks",
            fix="hold fewer out, or give more text (data.blocks)",
            where="recipe: refine.distill.held_out_blocks",
        )


def check_tasks(recipe: Recipe) -> None:
    """Raise DataError for a task whose file is missing, unreadable or none."""
    from soco_export.evaluate.items import load_items

    for task in recipe.validation.tasks:
        load_items(task)


def check_choices(recipe: Recipe, tokenizer: Any, context: int | None) -> None:
    """Raise DataError for a choice of a task that has no token, or more than the model has positions (`context`)."""
    from soco_export.evaluate.items import load_items

    for task in recipe.validation.tasks:
        texts = sorted({choice for item in load_items(task) for choice in item.choices})
        found = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
        for text, ids in zip(texts, found, strict=True):
            if not ids or (context is not None and len(ids) > context):
                room = f", and the model has positions for {context}" if ids else ""
                raise DataError(
                    f"the choice {text[:60]!r} has {len(ids)} tokens{room}",
                    fix="leave the item out",
                    where=str(task.path),
                )


def check_depth(recipe: Recipe) -> None:
    """Raise DataError if config.json says more layers than the files here hold tensors: nothing so deep is built."""
    from soco_export.files.safetensors import open_shards, weight_files
    from soco_export.model.load import dense_config
    from soco_export.model.source import find_folder

    folder = None if recipe.model.weights == "random" else find_folder(recipe)
    if folder is None:  # of the hub: its files are looked at when they are here
        return
    layers = getattr(dense_config(recipe).get_text_config(), "num_hidden_layers", 0)
    held = len(open_shards(weight_files(folder)))
    if held < layers:
        raise DataError(
            f"config.json says {layers} layers, and the files hold {held} tensors",
            fix="give the config.json that belongs to the weights",
            where=str(folder),
        )


def check_stack(recipe: Recipe) -> None:
    """Raise RecipeError if `refine.refit` is asked for and the layers lie in more than one stack of blocks."""
    if not recipe.refine.refit.blocks:
        return
    from soco_export.model.load import dense_skeleton
    from soco_train.modules.sites import open_sites
    from soco_train.modules.values import ranked_linears
    from soco_train.refine.refit import decoder_blocks

    model = dense_skeleton(recipe)
    open_sites(model)
    decoder_blocks(model, list(ranked_linears(model, recipe.layers, recipe.refine.values)))


def check_weights(recipe: Recipe, format: str) -> None:
    """Raise DataError for weights that are missing, left out, not finite, or tied in name only; reads all of them.

    So are those refused that float16 has no room for, where that is written. Weights are looked at where their files
    lie: next to no memory is taken.
    """
    import torch

    from soco_export.model.load import open_model
    from soco_export.model.weights import check_finite

    if recipe.model.weights == "random":
        return
    model = open_model(recipe)
    half = "float16" in (recipe.model.dtype, recipe.export.dtype if format == "onnx" else "")
    check_finite(model, recipe.name, torch.float16 if half else None)
    check_ties(model, recipe)
    if format == "onnx":
        check_scales(model, recipe.export)


def check_rounded_layers(recipe: Recipe) -> None:
    """Raise RecipeError for a layer that is trained as rounded by name, and that the model does not have.

    `each`, and in a plan's types `blocks`, are filled in from the plan: what a recipe says there is not read.
    """
    trained = recipe.refine.distill.rounding
    planned = trained.weights == "planned"
    if trained.each or (planned and trained.blocks):
        key = "each" if trained.each else "blocks"
        raise RecipeError(
            f"refine.distill.rounding.{key} is what a plan for bytes fills in, and a recipe does not choose it",
            fix="leave it out; export.each gives single layers a type",
            where=f"recipe: refine.distill.rounding.{key}",
        )
    if trained.blocks or trained.keep:
        names = _matrices(recipe)
        check_named(map(escape, trained.blocks), names, "refine.distill.rounding.blocks")  # by name, not by glob
        check_named(trained.keep, names, "refine.distill.rounding.keep")


def _matrices(recipe: Recipe) -> list[str]:
    """Return the names of the modules of the dense model that hold a matrix, a shared one too."""
    from soco_export.model.load import dense_skeleton
    from soco_train.modules.sites import open_sites

    model = dense_skeleton(recipe)
    open_sites(model)
    found = model.named_parameters(remove_duplicate=False)
    return [name.removesuffix(".weight") for name, weight in found if weight.ndim > 1]


def check_scales(model: Any, export: ExportSettings) -> None:
    """Raise DataError, naming it, for a matrix whose blocks have no scale in float16, in the type it is exported in."""
    import torch

    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        kind = export.weights_of(layer) if parameter.ndim > 1 else "same"
        if kind == "same":
            continue
        largest = float(torch.linalg.vector_norm(parameter.detach(), ord=torch.inf))
        scale = 2 * largest / (2 ** BITS[kind] - 1)
        rounded = float(torch.tensor(scale).half())
        if largest and not 0 < rounded < torch.inf:
            raise DataError(
                f"{name} holds |w| up to {largest:.3g}, and {kind} has scales from 6e-8 to 65504 (float16)",
                fix=f"store it unrounded: export.quantize.keep: [{layer}], or export.weights: same",
                where=name,
            )


def check_ties(model: Any, recipe: Recipe) -> None:
    """Raise DataError if config.json ties head and embedding and the files hold two different matrices."""
    import torch
    from safetensors import safe_open

    from soco_export.files.safetensors import open_shards, weight_files
    from soco_export.model.source import fetch_folder
    from soco_export.onnx.check import tied_apart

    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return
    names = [
        next(f"{name}.weight" for name, module in model.named_modules() if module is part) for part in (head, embedding)
    ]
    stored = open_shards(weight_files(fetch_folder(recipe)))
    if not all(name in stored for name in names):
        return
    values = []
    for name in names:
        with safe_open(str(stored[name].file), framework="pt") as file:
            values.append(file.get_tensor(name))
    if not torch.equal(*values):
        raise tied_apart(*names)
