"""A recipe fitted to a folder that is no run: blocks of text that its model has positions and embedding rows for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soco_export.files.json import context_length, read_config
from soco_export.files.wrapped import language_model
from soco_export.preflight.inputs import check_lengths
from soco_export.recipe.recipe import Recipe
from soco_train.errors import RecipeError
from soco_train.settings.data import SHORTEST_BLOCK

if TYPE_CHECKING:
    from soco_train.data.corpus import Blocks


def fit_to_context(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe with no text longer than the model's context, and a line for each that was and is read.

    Raises RecipeError for a context that has no room for a proof.
    """
    context = context_length(read_config(folder)) if (folder / "config.json").is_file() else None
    if context is None:
        return recipe, []
    if context < SHORTEST_BLOCK:
        raise RecipeError(
            f"the model has positions for {context} tokens, and a proof reads blocks of {SHORTEST_BLOCK} tokens",
            fix="--format dense writes a merged copy, which is not proven",
            where=str(folder / "config.json"),
        )
    parity = recipe.validation.parity
    asked = {
        "data.block": (recipe.data.block, context),
        "evaluation.block": (recipe.evaluation.block, context),
        "validate.parity.decode_steps": (parity.decode_steps, min(recipe.evaluation.block, context) - 1),
        "validate.parity.greedy_tokens": (parity.greedy_tokens, context - 1),
    }
    most = {key: room for key, (value, room) in asked.items() if value > room > 0}
    fitted = recipe.replace(most, where=str(folder)) if most else recipe
    check_lengths(fitted, context)
    read = {key: room for key, room in most.items() if key != "data.block" or recipe.export.reads_text}
    return fitted, [
        f"{key} is {room}: the model has {context} positions, not {asked[key][0]}" for key, room in read.items()
    ]


def folder_tokenizer(recipe: Recipe, folder: Path) -> Any:
    """Return the tokenizer of `folder`; errors as `load_tokenizer`."""
    from soco_export.model.load import load_tokenizer

    return load_tokenizer(recipe.replace({"model.path": str(folder), "model.weights": "pretrained"}))


def evaluation_text(recipe: Recipe, folder: Path) -> tuple[Any, Blocks]:
    """Return the tokenizer of `folder` and the blocks that a proof reads.

    Raises RecipeError for a token that the model has no embedding row for.
    """
    from soco_train.data.corpus import load_blocks

    tokenizer = folder_tokenizer(recipe, folder)
    blocks = load_blocks(tokenizer, recipe.evaluation, "evaluation")
    fields = read_config(folder) if (folder / "config.json").is_file() else {}
    rows = (language_model(fields) or fields).get("vocab_size")
    highest = int(blocks.tokens.max())
    if rows is not None and highest >= rows:
        raise RecipeError(
            f"tokenizer and model disagree: the text has token {highest}, the model has {rows} embedding rows",
            fix="give the tokenizer that belongs to the model",
            where=str(folder),
        )
    return tokenizer, blocks
