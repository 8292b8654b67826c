"""A recipe fitted to a folder that is no run: blocks of text that its model has positions and embedding rows for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from soco_export.files.json import context_length, read_config
from soco_export.preflight.inputs import check_lengths
from soco_export.recipe.recipe import Recipe
from soco_train.errors import RecipeError

if TYPE_CHECKING:
    from soco_train.data.corpus import Blocks


def fit_to_context(recipe: Recipe, folder: Path) -> tuple[Recipe, list[str]]:
    """Return the recipe with no block longer than the model's context, and a line for each that was.

    Raises RecipeError for a proof that has no room there.
    """
    context = context_length(read_config(folder)) if (folder / "config.json").is_file() else None
    blocks = {"data.block": recipe.data.block, "evaluation.block": recipe.evaluation.block}
    long = {key: context for key, block in blocks.items() if context is not None and block > context}
    fitted = recipe.replace(long, where=str(folder)) if long else recipe
    check_lengths(fitted, context)
    return fitted, [f"{key} is {context}, for which the model has positions, not {blocks[key]}" for key in long]


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
    inner = fields.get("text_config")
    rows = {**fields, **(inner if isinstance(inner, dict) else {})}.get("vocab_size")
    highest = int(blocks.tokens.max())
    if rows is not None and highest >= rows:
        raise RecipeError(
            f"tokenizer and model disagree: the text has token {highest}, the model has {rows} embedding rows",
            fix="give the tokenizer that belongs to the model",
            where=str(folder),
        )
    return tokenizer, blocks
