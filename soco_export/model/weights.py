"""Reading a dense model's weights: safetensors only, and every way they can be broken is named.

Headers are checked first (whole files, all shards there), then the model is made, then NaN and infinity refused. A
weight that keeps the dtype it is stored in is a view of its file: it takes memory only where it is used, and only such
as the system may take back.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from soco_export.checkpoint.load import misshapen
from soco_export.files.json import making_a_model
from soco_export.files.safetensors import is_derived, open_shards, renamed_views, weight_files
from soco_export.files.wrapped import language_names
from soco_export.model.apart import names_apart, read_apart
from soco_train.errors import DataError
from soco_train.numbers.faults import number_fault

# half precisions by their name in a safetensors header
HALVES = {"BF16": torch.bfloat16, "F16": torch.float16}


def check_weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors, each found whole; nothing but headers is read.

    Raises DataError for a missing, truncated or corrupt file and RecipeError where there are only pickles.
    """
    files = weight_files(folder)
    open_shards(files)  # with bounds, before a library reads the headers without any
    for file in files:
        try:
            with safe_open(str(file), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{file.name} is truncated or corrupt: {error}", fix="download it again", where=str(file)
            ) from error
    return files


def stored_dtype(folder: Path) -> torch.dtype:
    """Return the half precision that all weights in `folder` are stored in, else fp32; reads headers."""
    found = {tensor.dtype for tensor in open_shards(weight_files(folder)).values() if "F" in tensor.dtype}
    return HALVES.get(found.pop(), torch.float32) if len(found) == 1 else torch.float32


def map_weights(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the causal LM in `folder` on the CPU as it is stored, in eval mode, its weights views of the files.

    No number is read: what uses them must `check_finite`. Errors as `read_weights`.
    """
    model = _build(folder, config, trust_remote_code, stored_dtype(folder))
    if all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point()):
        return model
    # constants that the architecture computes in the weights' dtype would stay rounded in a wider one
    return _build(folder, config, trust_remote_code, torch.float32)


def read_weights(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the causal LM in `folder` in fp32 on the CPU, in eval mode, every weight present and finite.

    The files have passed `check_weight_files`. Raises DataError for a weight that is missing, misshapen or broken.
    """
    model = _build(folder, config, trust_remote_code, torch.float32)
    check_finite(model, str(folder))
    return model


def _build(folder: Path, config: Any, trust_remote_code: bool, dtype: torch.dtype) -> Any:
    stored = open_shards(weight_files(folder))
    kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    # misshapen weights are in the report, by name; transformers itself tells of them on the terminal alone
    reading = {"config": config, "dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with _quiet(), making_a_model(folder):
        if names := _own_names(kind, config, stored):
            model, report = read_apart(kind, state_dict=renamed_views(stored, names), **reading)
            model.name_or_path = str(folder)
            if (folder / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, use_safetensors=True, trust_remote_code=trust_remote_code, **reading
            )
    _check_report(report, folder)
    return model.eval()


def _own_names(kind: Any, config: Any, stored: Collection[str]) -> dict[str, str]:
    """Return tensor names of the files → the model's own; empty where transformers reads the files as they are."""
    if kind is None:  # a class that comes with its folder
        return {}
    return language_names(stored) or names_apart(kind, config, stored)


def _check_report(report: Mapping[str, Any], folder: Path) -> None:
    """Raise DataError for weights of the model that no file holds in its size, or tensors that the model leaves out.

    What it leaves out may be half of a number (a scale of 8-bit weights) or layers that config.json forgets.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(
            f"{len(missing)} weights of the model are not in its files, among them {missing[0]}",
            fix="download the model again; config.json may be another model's",
            where=str(folder),
        )
    if wrong := misshapen(report):
        raise DataError(
            f"{len(wrong)} weights are not of the size that config.json gives them, among them {wrong[0]}",
            fix="download the model again; config.json may be another model's",
            where=str(folder),
        )
    unread = sorted(name for name in report["unexpected_keys"] if not is_derived(name))
    if unread:
        raise DataError(
            f"{len(unread)} tensors of the files are not read by the model's class, among them {', '.join(unread[:3])}",
            fix="give the model as it was published; remove what is not the model's (a value head), and merge or "
            "dequantise what is stored in parts",
            where=str(folder),
        )


def check_finite(model: Any, where: str, dtype: torch.dtype | None = None) -> None:
    """Raise DataError naming the first weight that holds NaN, infinity, or what `dtype` has no room for."""
    for name, parameter in model.named_parameters():
        if fault := number_fault(parameter.detach(), dtype):
            fix = "download or repair the model" + (
                f"; or another type than {dtype} for what is written" if dtype else ""
            )
            raise DataError(f"{name} holds {fault}", fix=fix, where=where)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and warnings off the terminal while weights are read; what matters is checked here."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
