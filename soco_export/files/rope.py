"""What the table of rotary positions in a config.json may hold, in either spelling: one check for whoever reads it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from soco_train.errors import DataError

TABLES = ("rope_parameters", "rope_scaling")
_BESIDE = ("rope_theta", "partial_rotary_factor")  # of these the older spelling has none in its table
_MOST = 1e30  # of a number that no array counts by
_MOST_POSITIONS = 1_000_000_000
_MOST_PAIRS = 4096  # of a head of 8192 numbers


def is_above_zero(value: Any) -> bool:
    """Tell whether `value` is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < _MOST


def is_base(value: Any) -> bool:
    """Tell whether `value` is the base of a rotation, or a list of them: one a layer."""
    return is_above_zero(value) or (isinstance(value, list) and all(map(is_above_zero, value)))


def _is_each_above_zero(value: Any) -> bool:
    return isinstance(value, list) and 1 < len(value) <= _MOST_PAIRS and all(map(is_above_zero, value))


def is_from_zero(value: Any) -> bool:
    """Tell whether `value` is a finite number, 0 or above."""
    return is_above_zero(value) or (type(value) in (int, float) and value == 0)


def _is_length(value: Any) -> bool:
    return is_above_zero(value) and value == int(value) and value <= _MOST_POSITIONS


def _is_share(value: Any) -> bool:
    return is_above_zero(value) and value <= 1


_Rule = tuple[Callable[[Any], bool], str]
_NUMBER: _Rule = (is_above_zero, "a number above 0")
_FROM_ZERO: _Rule = (is_from_zero, "a number, not below 0")
_NUMBERS: _Rule = (_is_each_above_zero, "a list of numbers above 0, one a rotated pair")
_TEXT: _Rule = (lambda value: isinstance(value, str), "the name of a rope type")
# of fields that are there and not null; transformers (modeling_rope_utils.py) reads these
_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("rope_type", "type"), _TEXT),
    **dict.fromkeys(("factor", "attention_factor", "beta_fast", "beta_slow"), _NUMBER),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "short_mscale", "long_mscale"), _NUMBER),
    **dict.fromkeys(("mscale", "mscale_all_dim"), _FROM_ZERO),
    **dict.fromkeys(("short_factor", "long_factor"), _NUMBERS),
    "rope_theta": (is_base, "a number above 0"),
    "partial_rotary_factor": (_is_share, "a number above 0, at most 1"),
    "original_max_position_embeddings": (_is_length, f"a whole number from 1 to {_MOST_POSITIONS:,}"),
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
}
# fields of which the first must be below the second, or they divide by nothing
_ORDER = (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast"))


def check_rope(fields: Mapping[str, Any], where: str) -> None:
    """Raise DataError for a rotary table in a config.json's `fields` that is none, or a value of the wrong kind in it.

    A table may hold one for each kind of layer. Fields that no rope type reads are left to what reads them.
    """
    for key in TABLES:
        table = fields.get(key)
        if table is None:
            continue
        if not isinstance(table, dict):
            raise _wrong(key, table, "a table", where)
        for inner in (table, *(inner for inner in table.values() if isinstance(inner, dict))):
            _check_table(inner, where)
    if all(fields.get(key) for key in TABLES):
        _check_alike(fields, where)


def _check_alike(fields: Mapping[str, Any], where: str) -> None:
    """Raise DataError if a rotation is written twice and not alike: which of them counts depends on who reads.

    Of a table for each kind of layer the older spelling has that of full attention.
    """
    new, old = (fields[key] for key in TABLES)
    beside = {key: fields[key] for key in _BESIDE if key in fields}
    usual = {"partial_rotary_factor": 1, "original_max_position_embeddings": fields.get("max_position_embeddings")}
    one, other = (_named({**usual, **beside, **table}) for table in (new.get("full_attention") or new, old))
    if differing := sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key)):
        raise DataError(
            f"config.json writes its rotation twice, in {' and in '.join(TABLES)}, and {differing[0]} differs",
            fix="leave one of them out",
            where=where,
        )


def _named(table: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table with its type in the newer spelling, which counts where both are there."""
    rest = {key: value for key, value in table.items() if key != "type" and value is not None}
    return {"rope_type": table.get("type", "default"), **rest}


def _check_table(table: Mapping[str, Any], where: str) -> None:
    for key, (holds, words) in _RULES.items():
        value = table.get(key)
        if value is not None and not holds(value):
            raise _wrong(key, value, words, where)
    for low, high in _ORDER:
        if (table.get(low) or 0) >= (table.get(high) or math.inf):
            raise _wrong(low, table[low], f"below {high}", where)
    factors = [table.get(key) or [] for key in ("short_factor", "long_factor")]
    if all(factors) and len(factors[0]) != len(factors[1]):
        raise _wrong("long_factor", factors[1], f"as many numbers as short_factor: {len(factors[0])}", where)


def _wrong(key: str, value: Any, words: str, where: str) -> DataError:
    return DataError(f"config.json sets {key} to {repr(value)[:60]}", fix=f"{key}: {words}", where=where)
