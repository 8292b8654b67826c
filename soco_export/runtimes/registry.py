"""Where the export runs: one decorated class per runtime, which says all that this package knows of it.

`check` is asked before anything is trained, `write` makes what the runtime wants beside model.onnx, `open` runs the
folder in it, so that the proof measures there; `target` is what `--target NAME` sets, `here` what the doctor asks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from soco_export.files.json import NO_TOKEN, SPECIAL_IDS, read_generation_config
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config
from soco_export.onnx.settings import ExportSettings
from soco_train.errors import MachineError, RecipeError
from soco_train.installed import version_of

if TYPE_CHECKING:
    from soco_export.evaluate.decoders.decoder import Decoder
    from soco_export.evaluate.settings import ValidateSettings


@dataclass(frozen=True)
class Layout:
    """What `write` gets: the HF folder and its config, the folder with model.onnx, and how that was made."""

    source: Path
    folder: Path
    config: Config
    settings: ExportSettings


class Runtime:
    """A program that runs exported folders; a child overrides what differs from plain ONNX Runtime on a folder.

    `target`: settings in the form of `--set`, gates that it needs off included (`gates.max_export_kl=null`).
    `packages`: distributions that must be installed to run it on this machine; `install`: what to do if they are not.
    `reads_cache_sizes`, `reads_cache_types`: whether it makes each part of the cache of the size, or of the type, that
    the graph's own input has; others take one size for keys and values, from a config, and floats.
    """

    target: ClassVar[tuple[str, ...]] = ()
    packages: ClassVar[tuple[str, ...]] = ()
    reads_cache_sizes: ClassVar[bool] = False
    reads_cache_types: ClassVar[bool] = False
    install: ClassVar[str] = ""

    def check(self, settings: ExportSettings, architecture: Architecture | None) -> None:
        """Raise RecipeError for what the runtime cannot run; `architecture` is None where the graph is traced."""

    def write(self, to: Layout) -> None:
        """Write what it wants beside model.onnx."""

    def open(self, folder: Path, settings: ValidateSettings, name: str) -> Decoder | None:
        """Return the exported folder as a decoder called `name`, None if it cannot be asked from Python."""

    def here(self) -> str | None:
        """Return what is installed of it, None if it does not run on this machine."""
        found = {package: version_of(package) for package in self.packages}
        return ", ".join(f"{name} {version}" for name, version in found.items()) if all(found.values()) else None


RUNTIMES: dict[str, Runtime] = {}
_Kind = TypeVar("_Kind", bound=type[Runtime])


def runtime(name: str) -> Callable[[_Kind], _Kind]:
    """Register a runtime under a word for export.layouts, validate.runtime and --target."""

    def register(kind: _Kind) -> _Kind:
        RUNTIMES[name] = kind()
        return kind

    return register


def find_runtime(name: str, where: str) -> Runtime:
    """Return the runtime of that name; RecipeError if there is none."""
    if name not in RUNTIMES:
        raise RecipeError(f"there is no runtime {name!r}", fix=f"use one of {', '.join(RUNTIMES)}", where=where)
    return RUNTIMES[name]


def check_runtimes(settings: ExportSettings, architecture: Architecture | None) -> None:
    """Raise RecipeError for a name in export.layouts that no runtime has, or for what one of them cannot run."""
    for name in settings.layouts:
        found = find_runtime(name, "export.layouts")
        found.check(settings, architecture)
        check_cache(name, "export.layouts", settings, architecture)


def check_cache(name: str, where: str, settings: ExportSettings, architecture: Architecture | None) -> None:
    """Raise RecipeError for a runtime that makes another cache than the graph has, and would fail."""
    found = find_runtime(name, where)
    if architecture is not None and architecture.small_values and not found.reads_cache_sizes:
        able, cached, without = _able("reads_cache_sizes"), "values as large as keys", "refine.values.keep: 1"
    elif settings.cache != "same" and not found.reads_cache_types:
        able, cached, without = _able("reads_cache_types"), "floating-point numbers", "export.cache: same"
    else:
        return
    raise RecipeError(
        f"{name} caches {cached}, whatever the graph says",
        fix=f"{where}: {' or '.join(able)}, or {without}",
        where=where,
    )


def _able(flag: str) -> list[str]:
    return [name for name, kind in RUNTIMES.items() if getattr(kind, flag)]


def write_layouts(to: Layout) -> None:
    """Write what the runtimes that the settings name want, in that order."""
    for name in to.settings.layouts:
        RUNTIMES[name].write(to)


def check_opens(name: str) -> None:
    """Raise unless the proof can be run in the runtime of that name on this machine; needs no model."""
    found = find_runtime(name, "validate.runtime")
    if type(found).open is Runtime.open:
        openers = (other for other, kind in RUNTIMES.items() if type(kind).open is not Runtime.open)
        raise RecipeError(
            f"{name} cannot be asked from Python", fix=f"use one of {', '.join(openers)}", where="validate.runtime"
        )
    if found.here() is None:
        raise MachineError(
            f"{name} is not installed", fix=f"{found.install}, or validate.runtime: ort", where="validate.runtime"
        )


def special_tokens(to: Layout) -> dict[str, Any]:
    """The generation config's ids win over the config's; the first end token pads where nothing else does."""
    generation = read_generation_config(to.source, to.config.get("vocab_size"))
    own = {key: to.config.get(key) for key in SPECIAL_IDS}
    ids = {key: generation.get(key, None if own[key] == NO_TOKEN else own[key]) for key in SPECIAL_IDS}
    end = ids["eos_token_id"]
    if isinstance(end, list):
        end = end[0] if end else None  # no end token at all
        ids["eos_token_id"] = ids["eos_token_id"] or None
    fallback = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}
    known = (key for key in SPECIAL_IDS if (ids[key], end) != (None, None))
    return {key: fallback[key] if ids[key] is None else ids[key] for key in known}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read, other alphabets as they are."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
