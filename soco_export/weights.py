"""Reading a dense model's weights: safetensors only, and every way they can be broken is named.

Headers are checked first (whole files, all shards there), then everything is read once, then NaN and infinity refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from soco_train.errors import DataError, RecipeError


def check_weight_files(folder: Path) -> list[Path]:
    """Return the folder's safetensors, each found whole; nothing but headers is read.

    Raises DataError for a missing, truncated or corrupt file and RecipeError where there are only pickles.
    """
    files = _weight_files(folder)
    for file in files:
        try:
            with safe_open(str(file), framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise DataError(
                f"{file.name} is truncated or corrupt: {error}", fix="download it again", where=str(file)
            ) from error
    return files


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        except (ValueError, KeyError) as error:
            raise DataError(f"{index.name} is corrupt: {error}", fix="download it again", where=str(index)) from None
        return [folder / name for name in sorted(shards)]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if any(folder.glob("*.bin")) or any(folder.glob("*.pt")):
        raise RecipeError(
            f"{folder} holds its weights as pickles, which are never read",
            fix="convert them to safetensors (the hub often has them in a pull request: model.revision: refs/pr/N)",
            where=str(folder),
        )
    raise RecipeError(f"{folder} holds no weights", fix="give a folder with model.safetensors", where=str(folder))


def read_weights(folder: Path, config: Any, trust_remote_code: bool) -> Any:
    """Return the causal LM in `folder` in fp32 on the CPU, in eval mode, every weight present and finite.

    The files have passed `check_weight_files`. Raises DataError for a weight that is missing, misshapen or broken.
    """
    try:
        with _quiet():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, OSError) as error:
        raise DataError(
            f"cannot load the weights: {error}", fix="check that config.json belongs to them", where=str(folder)
        ) from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise DataError(
            f"{len(missing)} weights of the model are not in its files, among them {missing[0]}",
            fix="download the model again; config.json may be another model's",
            where=str(folder),
        )
    check_finite(model, str(folder))
    return model.eval()


def check_finite(model: Any, where: str) -> None:
    """Raise DataError naming the first weight that holds NaN or infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise DataError(
                f"{name} holds {bad} values that are NaN or infinite", fix="download or repair the model", where=where
            )


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
