"""The weights of a model's folder: which files they are, what these say they hold, and views of it; no number is read.

One rule says which files a folder's weights are, for whoever checks them and whoever loads them: those that the index
names, else model.safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from soco_train.bounded import read_json
from soco_train.errors import DataError, RecipeError
from soco_train.store.header import read_header

if TYPE_CHECKING:
    import torch

REPAIR = "copy or write the checkpoint again"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_OTHERS = (".safetensors", ".gguf", ".pth", ".h5", ".msgpack", ".npz")  # weights by names or in formats of others
# Buffers that older checkpoints store, and that every program computes from the config.
_DERIVED = re.compile(r"\.(inv_freq|cos_cached|sin_cached|attn\.bias|attention\.bias|masked_bias)$")
_SHARD = re.compile(r"^model-\d+-of-\d+\.safetensors$")


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and how it looks, from the file's header alone."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


def is_derived(name: str) -> bool:
    """Tell whether a tensor of this name is computed from the config, and no weight."""
    return _DERIVED.search(name) is not None


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that are the folder's weights.

    Raises DataError if one is missing or the index is none, RecipeError where it is unclear what the weights are.
    """
    if (folder / "adapter_config.json").exists():
        raise RecipeError(
            f"{folder} holds a PEFT adapter beside its weights: programs differ in whether they apply it",
            fix="merge it (PeftModel.merge_and_unload), or move adapter_config.json and its weights away",
            where=str(folder / "adapter_config.json"),
        )
    index, single = folder / INDEX, folder / SINGLE
    if index.exists() and single.exists():
        raise RecipeError(
            f"{folder} holds its weights twice: {SINGLE}, and the files that {INDEX} names",
            fix="move one of them away: programs differ in which they read",
            where=str(folder),
        )
    if index.exists():
        return _indexed(folder, index)
    if single.exists():
        return [single]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise RecipeError(
            f"{folder} holds its weights as pickles, which are never read",
            fix="convert them to safetensors (the hub often has them in a pull request: model.revision: refs/pr/N)",
            where=str(folder),
        )
    others = sorted(path.name for path in folder.iterdir() if path.suffix in _OTHERS)
    beside = f", beside {', '.join(others[:3])}" if others else ""
    fix = (
        f"copy the {INDEX} that belongs to them" if any(map(_SHARD.search, others)) else f"give a folder with {SINGLE}"
    )
    raise DataError(f"{folder} holds no weights: {SINGLE} is missing{beside}", fix=fix, where=str(folder))


def _indexed(folder: Path, index: Path) -> list[Path]:
    found = read_json(index, REPAIR)
    if not isinstance(found.get("metadata"), dict):
        raise DataError(
            f"{index.name} has no table metadata, without which transformers does not read it",
            fix='add "metadata": {}',
            where=str(index),
        )
    weights = found.get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise DataError(f"{index.name} names no files: weight_map is not a table", fix=REPAIR, where=str(index))
    names = sorted(set(weights.values()))
    outside = [name for name in names if Path(name).name != name or "\0" in name]
    if outside:
        raise DataError(f"{index.name} names a file elsewhere: {outside[0]!r}", fix=REPAIR, where=str(index))
    lost = [name for name in names if not (folder / name).is_file()]
    if lost:
        more = f" and {len(lost) - 1} more" if len(lost) > 1 else ""
        raise DataError(
            f"{lost[0]}{more} of {len(names)} shards is missing", fix="download it again", where=str(folder)
        )
    return [folder / name for name in names]


def open_shards(files: Iterable[Path | str]) -> dict[str, StoredTensor]:
    """Return the headers of `files`, by tensor name; DataError if one is truncated, or holds what is no weight.

    Whole numbers under the name of a weight are half of one, without the scales that they were rounded with: they load
    without an error, as another model. Tensors of other names (masks, orders) may be whole.
    """
    found: dict[str, StoredTensor] = {}
    for file in map(Path, files):
        held = read_header(file, REPAIR).tensors
        if twice := sorted(found.keys() & held.keys()):
            raise DataError(
                f"{twice[0]} lies in {found[twice[0]].file.name} and in {file.name} ({len(twice)} such tensors)",
                fix="keep one of them: programs differ in which they read",
                where=str(file),
            )
        found |= {name: StoredTensor(file, shape, dtype) for name, (dtype, shape) in held.items()}
    whole = [name for name, tensor in found.items() if name.endswith(".weight") and "F" not in tensor.dtype]
    if whole:
        kind = found[whole[0]].dtype
        raise DataError(
            f"{whole[0]} is stored as {kind}, whole numbers without their scales ({len(whole)} such weights)",
            fix="give the model as it was before it was rounded",
            where=str(found[whole[0]].file),
        )
    return found


def renamed_views(stored: Mapping[str, StoredTensor], names: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Return the tensors that `names` has, views of their files, under their new names."""
    from safetensors import safe_open

    found: dict[str, torch.Tensor] = {}
    for path in sorted({stored[name].file for name in names}):
        with safe_open(str(path), framework="pt") as file:  # one mapping for all of a file
            found |= {new: file.get_tensor(name) for name, new in names.items() if stored[name].file == path}
    return found
