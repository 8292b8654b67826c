"""JSON files of a model's folder, each read by one function that answers with its value or our error."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from soco_export.files.rope import check_rope, is_base, is_from_zero
from soco_train.bounded import read_json
from soco_train.errors import DataError, SocoError

CONFIG_BYTES = 16 << 20
FIX = "give the folder of a Hugging Face model"
# fields of which every model needs a number
EPSILONS = frozenset({"rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"})
_BASES = frozenset({"rope_theta", "rope_local_base_freq"})
# where a config.json says how many tokens its model reads
CONTEXT_KEYS = ("n_positions", "max_position_embeddings", "n_ctx")
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NO_TOKEN = -1  # what older config.json files say for it
# what a config.json may say at most: far above every published model, far below what fills a machine
_LARGEST = {
    "num_hidden_layers": 1000,
    "n_layer": 1000,
    "n_layers": 1000,
    "num_layers": 1000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "n_head": 100_000,
    "hidden_size": 1_000_000,
    "n_embd": 1_000_000,
    "intermediate_size": 10_000_000,
    "head_dim": 1_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
    "num_labels": 1_000_000,
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 4096),
}


@contextmanager
def making_a_model(folder: Path | str) -> Iterator[None]:
    """Raise DataError for whatever transformers finds wrong with a config.json: it reads most of its fields unchecked.

    Our own errors and a lack of memory pass.
    """
    try:
        yield
    except (SocoError, MemoryError):
        raise
    except Exception as error:
        if "out of memory" in str(error):
            raise
        raise _not_a_model(folder, error) from error


def _not_a_model(folder: Path | str, error: Exception) -> DataError:
    cause = error.__cause__ or error
    reason = (str(cause).strip().splitlines() or [type(error).__name__])[0][:300]
    if isinstance(cause, LookupError | ArithmeticError | AttributeError):  # their texts alone say little
        reason = f"{type(cause).__name__}, {reason}"
    if "NoneType" in reason and (nulls := _nulls(folder)):
        reason += f"; config.json says null for {', '.join(nulls)}"
    if "trust_remote_code" in str(error):
        return DataError(
            f"{folder} holds a model that needs its own code, which is not run unasked",
            fix="read the code, then --set model.trust_remote_code=true (in Python: trust_remote_code=True)",
            where=str(folder),
        )
    return DataError(
        f"transformers cannot make a model of {folder}: {reason}",
        fix="check that config.json is as it was published, and that the weights are its own",
        where=f"{folder}: config.json",
    )


def _nulls(folder: Path | str) -> list[str]:
    """Return the sizes that a folder's config.json says null for: not every class then takes what it would else."""
    path = Path(folder) / "config.json"
    fields = read_json(path, FIX, CONFIG_BYTES) if path.is_file() else {}
    return [key for key in _LARGEST if key in fields and fields[key] is None]


def read_config(folder: Path) -> dict[str, Any]:
    """Return `folder`'s config.json as it is written; DataError if it is absent, no JSON object, or beyond all sizes.

    A number that JSON has no word for is {"__float__": "Infinity"} in it (`plain_floats` gives the number).
    """
    path = folder / "config.json"
    if not path.exists() and (folder / "adapter_config.json").is_file():
        raise DataError(
            f"{folder} holds a PEFT adapter, not a model",
            fix="merge it first: PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(…)",
            where=str(folder / "adapter_config.json"),
        )
    fields = read_json(path, FIX, CONFIG_BYTES)
    inner = fields.get("text_config")
    for part in (fields, inner):
        check_sizes(part if isinstance(part, dict) else {}, str(path))
    decoder = {**fields, **inner} if isinstance(inner, dict) else fields
    named = {key: None if decoder.get(key) == NO_TOKEN else decoder.get(key) for key in SPECIAL_IDS}
    _check_ids(named, decoder.get("vocab_size"), path)
    return fields


def read_generation_config(folder: Path, rows: int | None = None) -> dict[str, Any]:
    """Return `folder`'s generation_config.json, empty if there is none; DataError for what transformers cannot read.

    So are token ids refused that are none. rows: how many tokens the model has.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return {}
    fields = read_json(path, FIX)
    _check_ids(fields, rows, path)
    from transformers import GenerationConfig

    try:
        GenerationConfig.from_dict(dict(fields))
    except Exception as error:  # it computes with most fields unchecked
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
        raise DataError(
            f"transformers cannot read {path.name}: {reason}",
            fix="give the one that was published with the model, or remove it",
            where=str(path),
        ) from error
    return fields


def _check_ids(fields: Mapping[str, Any], rows: int | None, path: Path) -> None:
    """Raise DataError for a special token's id that is no number, or that no model of `rows` tokens ever gives."""
    for key in SPECIAL_IDS:
        value = fields.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is None or (type(number) is int and 0 <= number < (rows or math.inf)):
                continue
            beyond = f", and the model has {rows:,} tokens" if type(number) is int and rows else ""
            raise DataError(
                f"{path.name} sets {key} to {repr(number)[:60]}{beyond}", fix=f"{key}: token ids", where=str(path)
            )


def context_length(config: Mapping[str, Any]) -> int | None:
    """Return for how many tokens a config.json says that the model has positions, None if it does not say."""
    parts = (config.get("text_config"), config)
    found = [part.get(key) for part in parts if isinstance(part, Mapping) for key in CONTEXT_KEYS]
    return next((length for length in found if isinstance(length, int)), None)


def check_sizes(fields: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a field of the wrong kind, or a size larger than any model's: nothing is built from it.

    Not every version of transformers looks before it computes.
    """
    numbers = plain_floats(fields)
    check_rope(numbers, where)
    _check_numbers(numbers, where)
    for key, most in _LARGEST.items():
        value = fields.get(key)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not (type(number) is int and 0 <= number <= most):
                shown = repr(number)[:60]
                raise DataError(
                    f"config.json sets {key} to {shown}", fix=f"{key}: a whole number up to {most:,}", where=where
                )


def check_window(kinds: Collection[str] | None, window: int | None, where: str) -> None:
    """Raise DataError for layers, by their kinds, that look back over a window of which a config gives no size."""
    if "sliding_attention" in (kinds or ()) and (window is None or window < 1):
        raise DataError(
            f"config.json has layers of sliding_attention, and no sliding_window: it is {window}",
            fix="give the config.json that was published with the model; of layers that see everything it is null",
            where=f"{where}: layer_types",
        )


def _check_numbers(fields: Mapping[str, Any], where: str) -> None:
    """Raise DataError for an epsilon or a rope's base that is no number, or none above 0 (an epsilon: 0)."""
    for key in (EPSILONS | _BASES) & fields.keys():
        value = fields[key]
        holds = is_base(value) if key in _BASES else is_from_zero(value)
        if value is not None and not holds:
            raise DataError(
                f"config.json sets {key} to {repr(value)[:60]}", fix=f"{key}: a number above 0", where=where
            )


def plain_floats(value: Any) -> Any:
    """Return `value` with each {"__float__": "Infinity"} as the number that it stands for."""
    if isinstance(value, list):
        return [plain_floats(item) for item in value]
    if not isinstance(value, dict):
        return value
    word = value.get("__float__")
    if len(value) == 1 and word in ("Infinity", "-Infinity", "NaN"):
        return float(word)
    return {key: plain_floats(item) for key, item in value.items()}
