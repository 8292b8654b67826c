"""Weights written a tensor at a time: the files that `save_pretrained` writes, without a model in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards

from soco_train.store.tensorfile import Pending, checked, write_file


def write_shards(folder: Path, tensors: Mapping[str, Pending], max_shard_size: int | str, parameters: int) -> None:
    """Write `tensors` into `folder` as safetensors, with an index if they are more than one file.

    parameters: of the model, for the index. Raises DataError if a value is NaN or infinite.
    """
    split = split_torch_state_dict_into_shards(
        {name: tensor.meta for name, tensor in tensors.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_size,
    )
    for file, names in split.filename_to_tensors.items():
        write_file(folder / file, {name: checked(name, tensors[name]) for name in names}, {"format": "pt"})
    if split.is_sharded:
        metadata = {"total_parameters": parameters, **split.metadata}
        index = {"metadata": metadata, "weight_map": split.tensor_to_filename}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
