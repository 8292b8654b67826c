"""The dense model and its tokenizer, read from the model's folder; safetensors only.

Everything that can be wrong with a folder is found before the first weight is read.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from soco_export.files.json import check_sizes, check_window, making_a_model, read_generation_config
from soco_export.files.tokenizer import FIX_TOKENIZER, check_tokenizer_files
from soco_export.model.source import BUILTIN_MODEL, architecture_fields, fetch_folder, find_folder, read_architecture
from soco_export.recipe.load import suggestion
from soco_export.recipe.recipe import Recipe
from soco_train.errors import DataError, RecipeError, panics_as_errors

# a tokenizer of fewer ids than this share of the embedding rows is another model's (rows are padded by far less)
SMALLEST_VOCABULARY = 0.75


def dense_config(recipe: Recipe) -> Any:
    """Return the `PretrainedConfig` of the dense model; RecipeError for an architecture transformers does not know."""
    from transformers import CONFIG_MAPPING, AutoConfig

    if recipe.model.trust_remote_code and recipe.model.weights == "pretrained":
        there = fetch_folder(recipe)
        with making_a_model(there):
            return AutoConfig.from_pretrained(there, trust_remote_code=True)
    # the folder's own fields, where there is one, say more than the recipe's
    pretrained = recipe.model.weights != "random"
    folder = find_folder(recipe) if pretrained else None
    fields = read_architecture(folder) if folder else architecture_fields(recipe)
    kind = fields.pop("model_type", None)
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        near = suggestion(str(kind), list(CONFIG_MAPPING.keys()))
        raise RecipeError(
            f"transformers does not know the architecture {kind!r}",
            fix=f"{near}update transformers, or set model.trust_remote_code",
            where="model.architecture.model_type",
        )
    check_sizes(fields, "model.architecture")
    where = str(folder or "model.architecture")
    _check_names(fields, CONFIG_MAPPING[kind], where)
    with making_a_model(folder or "model.architecture"):
        config = AutoConfig.for_model(kind, **fields)
    check_window(getattr(config, "layer_types", None), getattr(config, "sliding_window", None), where)
    return config


def _check_names(fields: Iterable[str], kind: type, where: str) -> None:
    """Raise DataError for a field of a config.json that would stand in the place of a method of its class."""
    if methods := [name for name in fields if callable(getattr(kind, name, None))]:
        raise DataError(
            f"config.json has a field {methods[0][:60]!r}, which is what the class of such a file does",
            fix="remove it: no model has it",
            where=where,
        )


def dense_skeleton(recipe: Recipe) -> Any:
    """Return the dense model on the device `meta`: its modules and shapes, no weights; errors as `dense_config`."""
    import torch
    from transformers import AutoModelForCausalLM

    config = dense_config(recipe)

    with making_a_model(find_folder(recipe) or "model.architecture"), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=recipe.model.trust_remote_code)


def load_tokenizer(recipe: Recipe) -> Any:
    """Return the model's tokenizer (the built-in one for random weights)."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = BUILTIN_MODEL if recipe.model.weights == "random" else fetch_folder(recipe)
    check_tokenizer_files(folder)
    try:
        with panics_as_errors():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=recipe.model.trust_remote_code)
    except Exception as first:  # the library of tokenizers raises bare Exceptions
        reason: Exception = first
    # transformers 4.57 does not know the tokenizer class that 5 writes, but reads its tokenizer.json
    if (folder / "tokenizer.json").is_file():
        try:
            with panics_as_errors():
                return PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens={})
        except Exception as second:
            reason = second
    raise _no_tokenizer(folder, reason) from reason


def _no_tokenizer(folder: Path, error: Exception) -> RecipeError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    fix = FIX_TOKENIZER
    if not (folder / "tokenizer.json").exists() and (folder / "tokenizer.model").exists():
        fix = "pip install sentencepiece protobuf, or add the tokenizer.json that transformers makes of tokenizer.model"
    elif (folder / "tokenizer.json").exists():
        fix = "download it again, or pip install --upgrade tokenizers transformers: a newer library may have written it"
    return RecipeError(f"no tokenizer in {folder}: {reason}", fix=fix, where=str(folder))


def check_vocabulary(tokenizer: Any, config: Any, where: str = "") -> None:
    """Raise RecipeError if the tokenizer gives ids the model has no row for, or is another model's (far too small)."""
    rows = config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    highest = max(vocabulary.values(), default=-1)
    beyond = sorted(number for number in vocabulary.values() if number >= rows)
    if beyond and len(beyond) <= len(tokenizer.get_added_vocab()):
        raise RecipeError(
            f"the tokenizer has tokens that the model has no embedding row for: ids {', '.join(map(str, beyond[:5]))}"
            f"; the model has {rows} rows",
            fix="remove these added tokens, or resize the model's embedding and train it",
            where=where,
        )
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
        from soco_export.model.weights import check_weight_files

        check_weight_files(fetch_folder(recipe))
        read_generation_config(fetch_folder(recipe), config.get_text_config().vocab_size)
    return tokenizer


def load_model(recipe: Recipe) -> tuple[Any, Any]:
    """Return (dense model in fp32 on the CPU, in eval mode; its tokenizer).

    Raises RecipeError (not found, vocabularies disagree) before, and DataError (missing weight, NaN) after reading.
    """
    config, tokenizer = dense_config(recipe), check_model(recipe)
    if recipe.model.weights == "random":
        from soco_export.model.tiny import random_model

        return random_model(config, recipe.train.seed), tokenizer
    from soco_export.model.weights import read_weights

    return read_weights(fetch_folder(recipe), config, recipe.model.trust_remote_code), tokenizer


def open_model(recipe: Recipe) -> Any:
    """Return the dense model on the CPU as its files have it, mapped and hardly in memory; values unchecked.

    Random weights are made, in fp32. Errors as `load_model`, short of values that are not finite.
    """
    if recipe.model.weights == "random":
        return load_model(recipe)[0]
    from soco_export.model.weights import map_weights

    config, _ = dense_config(recipe), check_model(recipe)
    return map_weights(fetch_folder(recipe), config, recipe.model.trust_remote_code)


def load_onto(recipe: Recipe, device: str, dtype: Any) -> Any:
    """Return the dense model on `device` in `dtype`, in eval mode; weights go there from their files one at a time.

    Errors as `load_model`.
    """
    from soco_export.model.weights import check_finite

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
