"""Writing a checkpoint folder: whole or not at all, in the form that transformers 4.57 and 5 both read.

`save_checkpoint` writes the pruned model, `save_dense` the same model with each product formed, which any program
reads with nothing of ours installed. stream.py writes what `save_checkpoint` does without the model in memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco_export.checkpoint.biases import check_dense_parts, fit_biases
from soco_export.checkpoint.card import render_card, summarise_layers
from soco_export.checkpoint.layers import dense_module, factored_layers, record_layers
from soco_export.checkpoint.reader import check_layer_tensors, pruned_layers
from soco_export.checkpoint.record import PLAN_KEY
from soco_export.checkpoint.versions import config_in_both_forms, tokenizer_in_both_forms
from soco_export.files.json import read_config
from soco_export.files.replacing import check_replaceable, replacing_folder
from soco_export.files.safetensors import open_shards, weight_files
from soco_train.bounded import read_json
from soco_train.modules.experts import open_mixtures, stacked_tensors
from soco_train.numbers.faults import check_numbers

SHARD = "5GB"


def save_checkpoint(
    model: Any, tokenizer: Any, out: Path, card: str | None = None, max_shard_size: int | str = SHARD
) -> None:
    """Write the model with its pruned layers as they are.

    model: a transformers model; tokenizer: its tokenizer, or None. card: the README.md (None: a short one). Raises
    DataError if a weight is NaN or infinite, RecipeError if `out` holds anything but what an earlier call wrote there;
    nothing is written then.
    """
    check_replaceable(out)
    record_layers(model)
    _check_finite(model)
    check_dense_parts(model)
    with replacing_folder(out) as folder:
        model.save_pretrained(str(folder), max_shard_size=max_shard_size)
        finish_folder(folder, model, tokenizer, card, {})
        check_layer_tensors(open_shards(weight_files(folder)), pruned_layers(read_config(folder)))


def save_dense(model: Any, tokenizer: Any, out: Path) -> None:
    """Write the model with each pruned layer merged to one dense weight; the model itself is left as it is.

    Arguments and errors as `save_checkpoint`; RecipeError also if a trained bias has no place in the plain
    architecture. All weights must be in memory, not offloaded to disk.
    """
    check_replaceable(out)
    _check_finite(model)
    state = dense_state(model)
    flags = fit_biases(model, state)
    with replacing_folder(out) as folder, _as_published(model):
        model.save_pretrained(str(folder), state_dict=state, max_shard_size=SHARD)
        finish_folder(folder, model, tokenizer, None, flags, dense=True)


@contextmanager
def _as_published(model: Any) -> Iterator[None]:
    """Within this context transformers 5 writes the experts of open mixtures as their publisher does."""
    own = model.__dict__.pop("_weight_conversions", None) if any(open_mixtures(model)) else None
    try:
        yield
    finally:
        if own is not None:
            model._weight_conversions = own


def dense_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the model's state with the tensors of each pruned layer replaced by its dense weight and bias."""
    state: dict[str, torch.Tensor] = dict(model.state_dict())
    for name, module in factored_layers(model).items():
        for part in module.state_dict():
            del state[f"{name}.{part}"]
        dense = dense_module(module)
        state.update({f"{name}.{part}": tensor for part, tensor in dense.state_dict().items()})
    for name, experts in open_mixtures(model):
        state |= stacked_tensors(experts.layout, state, name, len(experts))
    return state


def _check_finite(model: nn.Module) -> None:
    """Raise DataError if a parameter holds NaN or infinity. Parameters offloaded to disk are not read."""
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_numbers(name, parameter.detach())


def finish_folder(
    folder: Path, model: Any, tokenizer: Any, card: str | None, fields: Mapping[str, Any], dense: bool = False
) -> None:
    """Add what `save_pretrained` leaves out, and rewrite what only its own version would read."""
    config = config_in_both_forms(read_config(folder), _tied(model)) | dict(fields)
    if dense:
        config.pop("quantization_config", None)
        config.pop(PLAN_KEY, None)
    _write_json(folder / "config.json", config)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
        settings = folder / "tokenizer_config.json"
        if (folder / "tokenizer.json").exists():
            _write_json(settings, tokenizer_in_both_forms(read_json(settings, "give a tokenizer that saves itself")))
    for shard in weight_files(folder):
        _give_usual_mode(shard)
    text = render_card("", None, summarise_layers(model, dense=dense)) if card is None else card
    (folder / "README.md").write_text(text, encoding="utf-8")


def _give_usual_mode(path: Path) -> None:
    """Give a file that safetensors wrote, which is private to the user, the mode that the umask gives new files."""
    sample = path.with_name(path.name + ".mode")
    sample.touch()
    path.chmod(sample.stat().st_mode)
    sample.unlink()


def _tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
