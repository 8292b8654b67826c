"""What a section has measured: one JSON, written anew after every piece, so that whatever ends it loses one piece.

A piece is settled unless it has an `error`, or is `short` because its time was over: those are done again. A file with
another key is of other settings or of another device, and is begun anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from soco_export.files.atomic import write_atomic

DONE, TIME, FAILED, SKIPPED = "done", "time is up", "failed", "skipped"
Figures = Mapping[str, Any]


@dataclass
class Document:
    """header: what the figures depend on and were measured by; ended: how each part ended, by name; pieces by name."""

    path: Path
    key: str
    header: Mapping[str, Any]
    ended: dict[str, str] = field(default_factory=dict)
    pieces: dict[str, Figures] = field(default_factory=dict)

    @staticmethod
    def open(path: Path, key: str, header: Mapping[str, Any], fresh: bool = False) -> Document:
        """Go on with the file at `path` if it has this key, else begin."""
        document = Document(path, key, header)
        if fresh or not path.exists():
            return document
        found = json.loads(path.read_text(encoding="utf-8"))
        if found.get("key") == key:
            document.ended, document.pieces = found["ended"], found["pieces"]
        return document

    def settled(self, piece: str) -> bool:
        """Tell whether a piece is there for good."""
        figures = self.pieces.get(piece)
        return figures is not None and not {"error", "short"} & set(figures)

    def add(self, piece: str, figures: Figures) -> None:
        """Note a piece, and write."""
        self.pieces[piece] = figures
        self.save()

    def end(self, part: str, how: str) -> None:
        """Note how a part ended, and write."""
        self.ended[part] = how
        self.save()

    def over(self, part: str) -> bool:
        """Tell whether nothing is left to do for a part."""
        return self.ended.get(part, "") == DONE

    def save(self) -> None:
        """Write the file in one move."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        values = {"schema_version": 1, **{name: value for name, value in asdict(self).items() if name != "path"}}
        write_atomic(self.path, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
