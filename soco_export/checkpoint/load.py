"""A checkpoint folder → the model, unless it would run with a weight that the folder does not hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from soco_export.checkpoint.reader import check_checkpoint
from soco_export.files.json import making_a_model
from soco_export.files.safetensors import REPAIR
from soco_train.errors import DataError


def load_checkpoint(folder: Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> Any:
    """Return the causal LM of `folder`, pruned or dense, in evaluation mode.

    dtype: "auto" as stored. trust_remote_code: whether code that lies in the folder may run; never asked on stdin.
    Raises DataError, naming the file, if the folder is damaged, needs code that may not run, or holds no value for one
    of the model's weights.
    """
    check_checkpoint(folder)
    from transformers import AutoModelForCausalLM

    with making_a_model(folder):
        model, report = AutoModelForCausalLM.from_pretrained(
            str(folder),
            dtype=dtype,
            output_loading_info=True,
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        )
    for problem in ("missing_keys", "unexpected_keys"):
        names = sorted(report[problem])
        if names:
            raise DataError(
                f"weights and config.json disagree: {problem.replace('_', ' ')} {names[:3]} ({len(names)} in all)",
                fix=REPAIR,
                where=str(folder),
            )
    return model
