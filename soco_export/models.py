"""The dense model: which recipe a `--model` means, where its weights lie, and how they are read.

A model is a folder as transformers writes it. It is looked for at `model.path`, in the package (`weights: builtin`),
in `$SOCO_EXPORT_MODELS`, `./models` and `.` under the recipe's name or the hub id, and last on the Hugging Face hub.
Only safetensors are read. Everything that can be wrong with a folder is found before the first weight is read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soco_export.recipe import Recipe, list_recipes, load_recipe, suggestion
from soco_train.errors import RecipeError

BUILTIN_MODEL = Path(__file__).parent.parent / "soco_train" / "builtin" / "tiny"
# what must agree for a folder to be a recipe's model
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
# fields of a config.json that say how it was made, not what the model is
PROVENANCE = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# a second copy of the weights in another framework's layout
HUB_COPIES = ("consolidated*", "original/*", "onnx/*")
# a tokenizer of fewer ids than this share of the embedding rows is another model's (rows are padded by far less)
SMALLEST_VOCABULARY = 0.9
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
    """Take the settings of the shipped recipe whose sizes agree, else the base's; the architecture is the folder's."""
    fields = read_architecture(folder)
    own = {"path": str(folder), "weights": "pretrained", "architecture": fields}
    for name in list_recipes():
        if not disagreement(load_recipe(name).model.architecture, fields):
            return load_recipe(name, overrides, overlay=file, name=name, model=own)
    return load_recipe("base", overrides, overlay=file, name=folder.resolve().name, model=own)


def read_architecture(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json, rope settings in the form that transformers 4.57 and 5 both read."""
    file = folder / "config.json"
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{folder} holds no readable config.json", fix="give the folder of a Hugging Face model", where=str(file)
        ) from error
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method")
        raise RecipeError(
            f"{folder} holds a model that is already compressed ({method})",
            fix="start from the dense model",
            where=str(file),
        )
    return _with_plain_rope({key: value for key, value in fields.items() if key not in PROVENANCE})


def _with_plain_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Undo transformers 5's `rope_parameters`: 4.57 passes over it in silence and takes the default theta."""
    rope = fields.get("rope_parameters")
    if not isinstance(rope, Mapping) or any(isinstance(value, Mapping) for value in rope.values()):
        return fields
    plain = {key: value for key, value in fields.items() if key != "rope_parameters"}
    for key in ("rope_theta", "partial_rotary_factor"):
        if key in rope:
            plain[key] = rope[key]
    if rope.get("rope_type", "default") != "default":
        plain["rope_scaling"] = {k: v for k, v in rope.items() if k not in ("rope_theta", "partial_rotary_factor")}
    return plain


def disagreement(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Name the first size in which two architectures differ, or return nothing."""
    for key in ("model_type", *SIZES):
        if key in expected and expected[key] != found.get(key, expected[key] if key == "num_key_value_heads" else None):
            return f"{key} is {found.get(key)}, not {expected[key]}"
    return "" if expected else "no architecture"


def candidate_folders(recipe: Recipe) -> list[Path]:
    """Return where the weights may lie on this machine, best first."""
    if recipe.model.weights == "builtin":
        return [BUILTIN_MODEL]
    if recipe.model.path is not None:
        return [recipe.model.path]
    names = [recipe.name]
    if recipe.model.id is not None:
        names += [recipe.model.id.rpartition("/")[2], recipe.model.id]
    roots = [Path(root) for root in (os.environ.get("SOCO_EXPORT_MODELS"), "models", ".") if root]
    return [root / name for root in roots for name in names]


def find_folder(recipe: Recipe) -> Path | None:
    """Return the first candidate folder with a config.json; no network."""
    return next((folder for folder in candidate_folders(recipe) if (folder / "config.json").is_file()), None)


def fetch_folder(recipe: Recipe, files: Sequence[str] = HUB_FILES) -> Path:
    """Return the model's folder, downloaded from the hub (or found in its cache) if it is nowhere else.

    Raises RecipeError naming every place that was looked at.
    """
    folder = find_folder(recipe)
    if folder is None:
        return _download(recipe, files)
    difference = disagreement(recipe.model.architecture, read_architecture(folder)) if recipe.model.architecture else ""
    if difference:
        raise RecipeError(
            f"{folder} holds another model than recipe {recipe.name}: {difference}",
            fix=f"give --model {folder} to take the folder as it is, or move it away",
            where=str(folder / "config.json"),
        )
    return folder


def _download(recipe: Recipe, files: Sequence[str]) -> Path:
    looked = ", ".join(str(folder) for folder in candidate_folders(recipe))
    fix = "put the model's folder in one of these places, name it with --model FOLDER, or go online"
    if recipe.model.id is None:
        raise RecipeError(f"the weights of {recipe.name} are nowhere", fix=fix, where=f"looked at {looked}")
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(
            recipe.model.id,
            revision=recipe.model.revision,
            allow_patterns=list(files),
            ignore_patterns=list(HUB_COPIES),
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RecipeError(
            f"the weights of {recipe.model.id} are not on this machine, and the hub did not give them: {reason}",
            fix=fix + " (gated models need `hf auth login`)",
            where=f"looked at {looked}, the hub's cache and the hub",
        ) from error
    return Path(folder)


def architecture_fields(recipe: Recipe) -> dict[str, Any]:
    """Return the model's config fields: the recipe's, else those of the folder or hub id it names."""
    if recipe.model.architecture:
        return dict(recipe.model.architecture)
    return read_architecture(fetch_folder(recipe, files=("config.json",)))


def dense_config(recipe: Recipe) -> Any:
    """Return the `PretrainedConfig` of the dense model; RecipeError for an architecture transformers does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if recipe.model.trust_remote_code:
        return AutoConfig.from_pretrained(fetch_folder(recipe), trust_remote_code=True)
    # the folder's own fields, where there is one, say more than the recipe's
    pretrained = recipe.model.weights != "random"
    folder = find_folder(recipe) if pretrained else None
    fields = read_architecture(folder) if folder else architecture_fields(recipe)
    kind = fields.pop("model_type", None)
    if kind not in CONFIG_MAPPING:
        near = suggestion(str(kind), list(CONFIG_MAPPING.keys()))
        raise RecipeError(
            f"transformers does not know the architecture {kind!r}",
            fix=f"{near}update transformers, or set model.trust_remote_code",
            where="model.architecture.model_type",
        )
    return AutoConfig.for_model(kind, **fields)


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the model's tokenizer (the built-in one for random weights)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = BUILTIN_MODEL if recipe.model.weights == "random" else fetch_folder(recipe)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    except (OSError, ValueError, AttributeError) as error:
        # transformers 4.57 does not know the tokenizer class that 5 writes, but reads its tokenizer.json
        if (folder / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens={})
        raise RecipeError(f"no tokenizer in {folder}: {error}", fix="add tokenizer.json", where=str(folder)) from error


def check_vocabulary(tokenizer: Any, config: Any, where: str = "") -> None:
    """Raise RecipeError if the tokenizer gives ids the model has no row for, or is another model's (far too small)."""
    rows = config.get_text_config().vocab_size
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows or highest + 1 < SMALLEST_VOCABULARY * rows:
        raise RecipeError(
            f"tokenizer and model disagree: token ids go up to {highest}, the model has {rows} embedding rows",
            fix="give the tokenizer that belongs to the model",
            where=where,
        )


def check_model(recipe: Recipe) -> Any:
    """Return the tokenizer of a model whose parts are all there and belong together; reads headers, no weights.

    Raises RecipeError or DataError for all that is wrong with the model's files, short of values that are not finite.
    """
    config = dense_config(recipe)
    tokenizer = load_tokenizer(recipe)
    check_vocabulary(tokenizer, config, where=f"model {recipe.name}")
    if recipe.model.weights != "random":
        from soco_export.weights import check_weight_files

        check_weight_files(fetch_folder(recipe))
    return tokenizer


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """Return (dense model in fp32 on the CPU, in eval mode; its tokenizer).

    Raises RecipeError (not found, vocabularies disagree) before, and DataError (missing weight, NaN) after reading.
    """
    config, tokenizer = dense_config(recipe), check_model(recipe)
    if recipe.model.weights == "random":
        from soco_export.tiny import random_model

        return random_model(config, recipe.train.seed), tokenizer
    from soco_export.weights import read_weights

    return read_weights(fetch_folder(recipe), config, recipe.model.trust_remote_code), tokenizer


def open_model(recipe: Recipe) -> Any:
    """Return the dense model on the CPU as its files have it, next to nothing of it in memory; values unchecked.

    Random weights are made, in fp32. Errors as `load_model`, short of values that are not finite.
    """
    if recipe.model.weights == "random":
        return load_model(recipe)[0]
    from soco_export.weights import map_weights

    config, _ = dense_config(recipe), check_model(recipe)
    return map_weights(fetch_folder(recipe), config, recipe.model.trust_remote_code)


def load_onto(recipe: Recipe, device: str, dtype: Any) -> Any:
    """Return the dense model on `device` in `dtype`, in eval mode; weights go there from their files one at a time.

    Errors as `load_model`.
    """
    from soco_export.weights import check_finite

    model = put_on(open_model(recipe), device, dtype)
    check_finite(model, recipe.name)
    return model


def put_on(model: Any, device: str, dtype: Any) -> Any:
    """Return `model`, changed in place, on `device` with its parameters in `dtype`; ties stay ties.

    One parameter after the other, so that the host never holds the model in `dtype`. Buffers keep their dtype:
    `model.to(dtype)` would round the rotary frequencies as well, which puts late positions wrong by whole turns.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(device, dtype)
    return model.to(device)


def shrink(recipe: Recipe) -> Recipe:
    """Return the tiny variant (`--tiny`): 2 layers, random weights, built-in tokenizer and texts, few steps."""
    from soco_export.tiny import BLOCK, shrink_architecture

    text = {"builtin": "speeches", "block": BLOCK}
    return recipe.replace(
        {
            "name": f"{recipe.name}-tiny",
            "model.weights": "random",
            "model.dtype": "float32",
            "model.architecture": shrink_architecture(architecture_fields(recipe)),
            "data": {**text, "blocks": 32},
            "evaluation": {**text, "blocks": 8},
            "train.steps": min(recipe.train.steps, 20),
            "train.batch_tokens": 4 * BLOCK,
            "train.statistics_blocks": 16,
            "train.fisher_blocks": 8,
            "train.factor_dtype": "float32",
            "train.checkpoint_every": 10,
            "refine.distill.steps": min(recipe.refine.distill.steps, 6),
            "refine.distill.batch_tokens": 4 * BLOCK,
            "export.dtype": "float32",
            "validate.provider": "CPUExecutionProvider",
            "validate.parity.prompt": BLOCK,
            "bench.rounds": min(recipe.bench.rounds, 3),
            "gates": {key: getattr(recipe.gates, key) for key in EXPORT_GATES},
        },
        where="--tiny",
    )
