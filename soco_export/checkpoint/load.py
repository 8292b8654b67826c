"""A checkpoint folder → the model, unless it would run with a weight that the folder does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soco_export.checkpoint.reader import check_checkpoint
from soco_export.checkpoint.versions import older_rope
from soco_export.files.json import making_a_model, read_config
from soco_export.files.safetensors import REPAIR, StoredTensor, is_derived, renamed_views
from soco_export.files.wrapped import decoder_config, language_model, language_names
from soco_train.errors import DataError

# What a config.json may say of the answers that somebody wanted: ours are made of logits and a cache.
_ANSWERS = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}


def load_checkpoint(folder: Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False) -> Any:
    """Return the causal LM of `folder`, pruned or dense, in evaluation mode; of several models the decoder alone.

    dtype: "auto" as stored. trust_remote_code: whether code that lies in the folder may run; never asked on stdin.
    Raises DataError, naming the file, if the folder is damaged, needs code that may not run, or holds no value for one
    of the model's weights.
    """
    stored = check_checkpoint(folder)
    # what is mismatched is named below: transformers would tell of it on the terminal, and raise without a name
    reading = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    with making_a_model(folder):
        model, report = _decoder(folder, stored, **reading) or _as_it_is(folder, trust_remote_code, **reading)
    kinds = ("missing_keys", "unexpected_keys")
    problems = {kind: sorted(key for key in report[kind] if not is_derived(key)) for kind in kinds}
    for problem, names in {**problems, "mismatched_keys": misshapen(report)}.items():
        if names:
            raise DataError(
                f"weights and config.json disagree: {problem.replace('_', ' ')} {names[:3]} ({len(names)} in all)",
                fix=REPAIR,
                where=str(folder),
            )
    return model


def tensors_of_class(folder: Path, trust_remote_code: bool = False) -> set[str]:
    """Return the names of all tensors that the model in `folder` has by its class, which is made without weights."""
    from transformers import AutoModelForCausalLM

    with making_a_model(folder), torch.device("meta"):
        config = _config(folder, trust_remote_code)
        return set(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code).state_dict())


def misshapen(report: Mapping[str, Any]) -> list[str]:
    """Return the weights that are not of the size that config.json gives them, as `from_pretrained` tells of them.

    transformers 4.57 has their names, 5 also the sizes.
    """
    return sorted(key if isinstance(key, str) else key[0] for key in report["mismatched_keys"])


def _as_it_is(folder: Path, trust_remote_code: bool, **reading: Any) -> Any:
    """Return (model, report) as transformers reads the folder."""
    from transformers import AutoModelForCausalLM

    where = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    return AutoModelForCausalLM.from_pretrained(
        str(folder), config=_config(folder, trust_remote_code), **where, **reading
    )


def _config(folder: Path, trust_remote_code: bool) -> Any:
    """Return the folder's config as transformers 5 reads it, without what only says how somebody ran the model.

    4.57 passes over the newer spelling of a rotation.
    """
    from transformers import AutoConfig, PretrainedConfig

    fields = read_config(folder)
    inner = language_model(fields)
    if inner is None:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    else:
        fields, config = inner, decoder_config(inner)
    knows = hasattr(PretrainedConfig, "standardize_rope_params")
    rope = {} if knows else older_rope(fields.get("rope_parameters") or {}, fields.get("model_type"))
    for key, value in {**_ANSWERS, **rope}.items():
        setattr(config, key, value)
    config._attn_implementation = None  # whatever this machine has
    return config


def _decoder(folder: Path, stored: Mapping[str, StoredTensor], **reading: Any) -> Any:
    """Return (model, report) of the decoder among several models, None where the folder is of one."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    if language_model(read_config(folder)) is None:
        return None
    config = _config(folder, trust_remote_code=False)
    views = renamed_views(stored, language_names(stored))
    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(None, config=config, state_dict=views, **reading)
