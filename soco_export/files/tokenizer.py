"""The files of a model's tokenizer: which a folder holds, and what is wrong with one of them."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from soco_train.bounded import read_bytes, read_json, read_text
from soco_train.errors import DataError

FIX_TOKENIZER = "add the tokenizer.json that was published with the model"
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_TEMPLATES = "additional_chat_templates"  # where transformers looks for chat templates that have a name
_MOST_GROWTH = 256  # characters that a normalizer makes of one: published ones make at most a few
_FIX_TEMPLATE = "chat_template: the text of a Jinja template, or texts by name"


def tokenizer_files(folder: Path) -> list[str]:
    """Return the names, relative to `folder`, of its tokenizer's files, those of links that lead nowhere too."""
    found = [name for name in _FILES if os.path.lexists(folder / name)]
    return found + sorted(f"{_TEMPLATES}/{path.name}" for path in (folder / _TEMPLATES).glob("*.jinja"))


def check_tokenizer_files(folder: Path) -> None:
    """Raise DataError for a tokenizer's file that is none of its own, not of its kind or not of a bearable size."""
    for name in tokenizer_files(folder):
        path = folder / name
        if path.suffix == ".json":
            _check_fields(read_json(path, FIX_TOKENIZER), path)
        elif path.suffix == ".model":
            read_bytes(path, FIX_TOKENIZER)
        else:
            read_text(path, FIX_TOKENIZER)


def _check_fields(fields: dict[str, Any], path: Path) -> None:
    length = fields.get("model_max_length") if path.name != "vocab.json" else None
    if isinstance(length, bool) or not isinstance(length, int | float | type(None)):
        raise DataError(
            f"{path.name} sets model_max_length to {str(length)[:60]!r}, which is no number",
            fix=FIX_TOKENIZER,
            where=str(path),
        )
    growth = _growth(fields.get("normalizer")) if path.name == "tokenizer.json" else 1
    if growth > _MOST_GROWTH:
        raise DataError(
            f"{path.name} has a normalizer that makes up to {growth:,} characters of one",
            fix=FIX_TOKENIZER,
            where=str(path),
        )
    if path.name == "tokenizer_config.json":
        _check_template(fields.get("chat_template"), path)


def _growth(normalizer: Any) -> int:
    """Return how many characters a normalizer of a tokenizer.json makes of one, at most; what it does not know, 1."""
    if not isinstance(normalizer, dict):
        return 1
    inner = normalizer.get("normalizers")
    if isinstance(inner, list):
        return math.prod(map(_growth, inner))
    longest = max(
        (len(text) for key in ("content", "prepend") if isinstance(text := normalizer.get(key), str)), default=1
    )
    return max(1, longest)


def _check_template(found: Any, path: Path) -> None:
    """Raise DataError unless `found` is text, or texts by name; a name becomes a file's, so it must be no path."""
    named = list(found.items()) if isinstance(found, dict) else []
    if isinstance(found, list):
        named = [(part.get("name"), part.get("template")) if isinstance(part, dict) else ("", None) for part in found]
    elif not isinstance(found, dict | str | None):
        named = [("", None)]
    for name, text in named:
        if not isinstance(text, str) or not _is_name(name):
            shown = repr(found)[:100]
            message = f"{path.name} has a chat template that is none: {shown}"
            raise DataError(message, fix=_FIX_TEMPLATE, where=str(path))


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.isprintable() and name not in ("", "..") and Path(name).name == name
