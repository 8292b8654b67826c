"""Which text is read, how it is cut into blocks, and which layers of the model take part."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from soco_train.settings.section import Section

SHORTEST_BLOCK = 8  # tokens
BuiltinText = Literal["speeches", "time-machine"]


class DataSettings(Section):
    """A text source and how it is cut into blocks; exactly one of `path`, `hub`, `builtin` is set.

    `block` is in tokens; `blocks` caps how many are used (None: all). `format` "auto" goes by suffix: `.jsonl` reads
    the field `text` of each line, `.raw` is WikiText rows joined by an empty line, anything else is plain text.
    """

    path: Path | Annotated[tuple[Path, ...], Field(min_length=1)] | None = None
    hub: str | None = None
    builtin: BuiltinText | Annotated[tuple[BuiltinText, ...], Field(min_length=1)] | None = None
    format: Literal["auto", "text", "jsonl", "wikitext"] = "auto"
    block: int = Field(default=512, ge=SHORTEST_BLOCK)
    blocks: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if sum(source is not None for source in (self.path, self.hub, self.builtin)) != 1:
            raise ValueError("exactly one of path, hub, builtin must be set")
        return self


class LayerSettings(Section):
    """Which nn.Linear modules take part: fnmatch globs over module names; `*` crosses dots."""

    include: tuple[str, ...] = ("*.layers.*", "*.h.*", "*.blocks.*")
    exclude: tuple[str, ...] = ("*lm_head*", "*embed*", "*norm*", "*router*", "*.gate")
