"""Which recipe a `--model` means (a recipe's name, a hub id or a folder), and its tiny variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from soco_export.model.source import architecture_fields, disagreement, read_architecture
from soco_export.recipe.load import list_recipes, load_recipe, suggestion
from soco_export.recipe.recipe import Recipe
from soco_train.errors import RecipeError

# what random weights can be held to
EXPORT_GATES = ("max_export_kl", "max_logit_difference", "min_token_agreement", "min_greedy_agreement")


def recipe_for(model: str | None, file: Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """Return the recipe that `--model` (recipe name, hub id or folder), `--recipe` and `--set` mean together.

    Raises RecipeError: none given, unknown model, or anything `load_recipe` refuses.
    """
    if model is None:
        if file is None:
            raise RecipeError("no model", fix=f"give --model, one of: {', '.join(list_recipes())}; or --recipe")
        return load_recipe(file, overrides)
    if model in list_recipes():
        return load_recipe(model, overrides, overlay=file, name=model)
    if Path(model).is_dir():
        return _recipe_of_folder(Path(model), file, overrides)
    if Path(model).is_file():
        kind = "a GGUF file, which cannot be read" if model.endswith(".gguf") else "a file"
        raise RecipeError(
            f"{model} is {kind}", fix="give the folder of the Hugging Face model it was made of", where="--model"
        )
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise RecipeError(f"there is no folder {model}", fix="give a folder with config.json", where="--model")
    if "/" not in model:
        raise RecipeError(
            f"unknown model {model!r}",
            fix=f"{suggestion(model, list_recipes())}give a recipe ({', '.join(list_recipes())}), a hub id or a folder",
            where="--model",
        )
    return _recipe_of_id(model, file, overrides)


def _recipe_of_id(model: str, file: Path | None, overrides: Sequence[str]) -> Recipe:
    for name in list_recipes():
        if load_recipe(name).model.id == model:
            return load_recipe(name, overrides, overlay=file, name=name)
    return load_recipe("base", overrides, overlay=file, name=model.rpartition("/")[2], model={"id": model})


def _recipe_of_folder(folder: Path, file: Path | None, overrides: Sequence[str]) -> Recipe:
    """Take the settings of our recipe whose sizes agree, else the base's; the architecture is the folder's."""
    fields = read_architecture(folder)
    own = {"path": str(folder), "weights": "pretrained", "architecture": fields}
    for name in list_recipes():
        if not disagreement(load_recipe(name).model.architecture, fields):
            return load_recipe(name, overrides, overlay=file, name=name, model=own)
    return load_recipe("base", overrides, overlay=file, name=folder.resolve().name, model=own)


def shrink(recipe: Recipe) -> Recipe:
    """Return the tiny variant (`--tiny`): 2 layers, random weights, built-in tokenizer and texts, few steps."""
    from soco_export.model.tiny import TINY_BLOCK, shrink_architecture

    text = {"builtin": "speeches", "block": TINY_BLOCK}
    return recipe.replace(
        {
            "name": f"{recipe.name}-tiny",
            "model.weights": "random",
            "model.dtype": "float32",
            "model.architecture": shrink_architecture(architecture_fields(recipe)),
            "data": {**text, "blocks": 32},
            "evaluation": {**text, "blocks": 8},
            "train.steps": min(recipe.train.steps, 20),
            "train.batch_tokens": 4 * TINY_BLOCK,
            "train.statistics_blocks": 16,
            "train.fisher_blocks": 8,
            "train.factor_dtype": "float32",
            "train.checkpoint_every": 10,
            "refine.distill.steps": min(recipe.refine.distill.steps, 6),
            "refine.distill.batch_tokens": 4 * TINY_BLOCK,
            "export.dtype": "float32",
            "validate.provider": "CPUExecutionProvider",
            "validate.parity.prompt": TINY_BLOCK,
            "bench.rounds": min(recipe.bench.rounds, 3),
            "bench.seconds": min(recipe.bench.seconds, 0.2),
            "bench.cold_starts": min(recipe.bench.cold_starts, 1),
            "gates": {key: getattr(recipe.gates, key) for key in EXPORT_GATES},
        },
        where="--tiny",
    )
