"""Where a dense model lies: its folder, found once, and what its config.json says.

A model is a folder as transformers writes it. It is looked for at `model.path`, in the package (`weights: builtin`),
in `$SOCO_EXPORT_MODELS`, `./models` and `.` under the recipe's name or the hub id, and last on the Hugging Face hub.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soco_export.checkpoint.versions import older_rope
from soco_export.files.json import plain_floats, read_config
from soco_export.files.wrapped import MODEL_SIZES, language_model
from soco_export.recipe.recipe import Recipe
from soco_train.errors import DataError, RecipeError

BUILTIN_MODEL = Path(__file__).parents[2] / "soco_train" / "builtin" / "tiny"
# fields of a config.json that say how it was made, not what the model is
PROVENANCE = (
    *("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"),
    # how somebody ran its attention: ours to choose
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
    # what its forward pass once was to answer, and in which form: training asks for its own
    *("return_dict", "output_hidden_states", "output_attentions", "torchscript"),
    "quantization_config",  # only null gets this far
    "soco_export",  # how a plan would have an export write it
)
_MOST_VALUES = 20_000  # of a dense config.json: a run keeps all of them in its lock, at 0.2 ms each until it begins
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
# a second copy of the weights in another framework's layout
HUB_COPIES = ("consolidated*", "original/*", "onnx/*")


def read_architecture(folder: Path) -> dict[str, Any]:
    """Return the fields of a folder's config.json, rope settings in the form that transformers 4.57 and 5 both read.

    Of a model that reads images or sounds as well they are those of its language model.
    """
    fields = plain_floats(read_config(folder))
    record = fields.get("quantization_config")
    if record is not None:
        method = record.get("quant_method") if isinstance(record, dict) else record
        raise RecipeError(
            f"{folder} holds a model that is already compressed ({method})",
            fix="start from the dense model",
            where=str(folder / "config.json"),
        )
    fields = language_model(fields) or fields
    if _values(fields) > _MOST_VALUES:
        raise DataError(
            f"config.json holds more than {_MOST_VALUES:,} values",
            fix="leave out what says nothing of the model (id2label)",
            where=str(folder / "config.json"),
        )
    return _with_plain_rope({key: value for key, value in fields.items() if key not in PROVENANCE})


def _values(value: Any) -> int:
    """Return how many values there are in `value`, which is no deeper than a file of JSON may be."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + sum(map(_values, inner))


def _with_plain_rope(fields: dict[str, Any]) -> dict[str, Any]:
    """Undo transformers 5's `rope_parameters`: 4.57 passes over it in silence and takes the default theta.

    Where it has a table for each kind of layer, which 4.57 cannot say of every class, it stays beside the older fields.
    """
    rope = fields.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return fields
    layered = any(isinstance(value, Mapping) for value in rope.values())
    kept = {key: value for key, value in fields.items() if layered or key != "rope_parameters"}
    return kept | older_rope(rope, fields.get("model_type"))


def disagreement(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    """Name the first size in which two architectures differ, or return nothing."""
    for key in ("model_type", *MODEL_SIZES):
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
