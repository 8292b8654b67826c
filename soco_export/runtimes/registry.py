"""What each runtime wants beside model.onnx: one decorated writer per layout, called in the order of export.layouts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from soco_export.files.json import FIX
from soco_export.onnx.describe.config import Config
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import RecipeError
from soco_train.store.bounded import read_json


@dataclass(frozen=True)
class Layout:
    """What a writer gets: the HF folder and its config, the folder with model.onnx, and how that was made."""

    source: Path
    folder: Path
    config: Config
    settings: ExportSettings


Writer = Callable[[Layout], None]
LAYOUTS: dict[str, Writer] = {}


def layout(name: str) -> Callable[[Writer], Writer]:
    """Register a writer under a word for export.layouts."""

    def register(writer: Writer) -> Writer:
        LAYOUTS[name] = writer
        return writer

    return register


def check_layouts(settings: ExportSettings) -> None:
    """Raise RecipeError for a layout that nobody writes."""
    for name in settings.layouts:
        if name not in LAYOUTS:
            raise RecipeError(
                f"there is no layout {name!r}", fix=f"use one of {', '.join(LAYOUTS)}", where="export.layouts"
            )


def write_layouts(to: Layout) -> None:
    """Run the writers that the settings name."""
    for name in to.settings.layouts:
        LAYOUTS[name](to)


def special_tokens(to: Layout) -> dict[str, Any]:
    """The generation config's ids win over the config's; the first end token pads where nothing else does."""
    path = to.source / "generation_config.json"
    generation = read_json(path, FIX) if path.exists() else {}
    keys = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {key: generation.get(key, to.config.get(key)) for key in keys}
    end = ids["eos_token_id"]
    if isinstance(end, list):
        end = end[0] if end else None  # no end token at all
        ids["eos_token_id"] = ids["eos_token_id"] or None
    fallback = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    return {key: fallback[key] if ids[key] is None else ids[key] for key in keys if (ids[key], end) != (None, None)}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, other alphabets as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
