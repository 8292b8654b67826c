"""What a recipe may say: everything a run does, in one frozen value, and what is wrong with a wrong one.

Imports pydantic and yaml only, so that `--help` and `recipes list` stay fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from soco_export.bench.settings import BenchSettings, LatencySettings
from soco_export.evaluate.settings import ValidateSettings
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.merge import overridden, with_key
from soco_export.recipe.yaml import Origins
from soco_export.report.gates import GateSettings
from soco_train.errors import RecipeError
from soco_train.settings.data import DataSettings, LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.section import Section
from soco_train.settings.train import TrainSettings

LONGEST_NAME = 200  # bytes; a file system has 255, and parts are added to it


class ModelSettings(Section):
    """Which dense model. `architecture` holds the fields of its published config.json, so that a dry run needs nothing.

    `path` (a local folder) goes before `id` (Hugging Face hub). `dtype` is that of the HF folder that is written.
    `weights`: `builtin` is the small model inside the package; `random` builds the architecture with seeded random
    weights and the built-in tokenizer (`--tiny`).
    """

    id: str | None = None
    path: Path | None = None
    revision: str | None = None
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    trust_remote_code: bool = False
    weights: Literal["pretrained", "builtin", "random"] = "pretrained"
    architecture: dict[str, Any] = Field(default_factory=dict)


class Recipe(PlanSettings):
    """One run, whole. The plan's keys (`keep_params`, `storage`, …) stand at the top level.

    `optimise_for: latency` leaves a layer dense where its low-rank form was measured to be no faster.
    """

    name: str
    description: str = ""
    optimise_for: Literal["params", "latency"] = "params"
    latency: LatencySettings = LatencySettings()
    model: ModelSettings
    data: DataSettings
    evaluation: DataSettings
    layers: LayerSettings = LayerSettings()
    train: TrainSettings = TrainSettings()
    refine: RefineSettings = RefineSettings()
    export: ExportSettings = ExportSettings()
    # pydantic's own (deprecated) `validate` is in the way of the attribute, not of the key
    validation: ValidateSettings = Field(default=ValidateSettings(), alias="validate")
    bench: BenchSettings = BenchSettings()
    gates: GateSettings = GateSettings()

    @field_validator("name")
    @classmethod
    def _one_folder(cls, name: str) -> str:
        """Refuse a name that is no folder's: a run of it lies in runs/NAME."""
        if name in ("", ".", "..") or not name.isprintable() or any(mark in name for mark in "/\\"):
            raise ValueError(f"{name[:60]!r} is no name of a folder: a run of it lies in runs/NAME")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"it is {len(name.encode())} bytes long, and a folder's name has at most {LONGEST_NAME}")
        return name

    @model_validator(mode="after")
    def _a_distilled_size(self) -> Recipe:
        sizes = self.refine.distill.sizes
        if sizes is None:
            return self
        if not sizes[0] <= self.keep_params <= sizes[1]:
            raise ValueError(f"keep_params {self.keep_params:g} is not within refine.distill.sizes {list(sizes)}")
        if self.keep_bytes is not None or self.optimise_for != "params" or self.allocation == "lagrangian":
            raise ValueError(
                "refine.distill.sizes needs plans that are prefixes of each other: no keep_bytes, "
                "optimise_for: params, allocation: global or uniform"
            )
        if self.train.deviation:
            raise ValueError(
                "refine.distill.sizes needs train.deviation: false: a layer that is dense at some sizes has no place "
                "for the bias that the others would have"
            )
        return self

    @property
    def plan(self) -> PlanSettings:
        """The plan's settings alone."""
        return PlanSettings(**{key: getattr(self, key) for key in PlanSettings.model_fields})

    def replace(self, changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Return a copy with dotted keys set, validated: `recipe.replace({"train.steps": 4})`."""
        values = self.as_values()
        for key, value in changes.items():
            values = with_key(values, key, value)
        return validated(values, {key: where for key in changes})

    def as_values(self) -> dict[str, Any]:
        """Return its keys and values as lock files and results.json have them."""
        return self.model_dump(mode="json", by_alias=True)

    def with_sections(self, other: Recipe, sections: Collection[str]) -> Recipe:
        """Return a copy whose top-level keys in `sections` are those of `other`."""
        fields = [name for name, info in Recipe.model_fields.items() if (info.alias or name) in sections]
        return self.model_copy(update={name: getattr(other, name) for name in fields})

    def override(self, overrides: Sequence[str]) -> Recipe:
        """Return a copy with each `key=value` of `--set` applied, validated."""
        values, origins = overridden(self.as_values(), overrides)
        return validated(values, origins)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key a recipe may hold, in order."""
    fields: dict[str, Any] = {info.alias or name: info.annotation for name, info in section.model_fields.items()}
    for field, annotation in (fields | getattr(section, "of_steps", {})).items():
        key = f"{prefix}{field}"
        yield key
        inner = _section_of(annotation)
        if inner is not None:
            yield from keys(inner, f"{key}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def validated(values: Mapping[str, Any], origins: Origins) -> Recipe:
    """Return the recipe of nested values; RecipeError, with where it was written, for the first thing wrong."""
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise _translated(error, origins) from None


def _translated(error: ValidationError, origins: Origins) -> RecipeError:
    """Turn pydantic's report into our one error, about the first finding."""
    found = error.errors()[0]
    unknown = found["type"] == "extra_forbidden"
    key = _key_of(found["loc"], unknown)
    reason = found["msg"].removeprefix("Value error, ")
    if unknown:
        message, fix = f"unknown key {key}", _nearest_key(key)
    elif found["type"] == "missing":
        message, fix = f"{key} is {'incomplete' if isinstance(found['loc'][-1], int) else 'missing'}", f"set {key}"
    elif reason.startswith("Input "):
        message, fix = f"{key} cannot be {repr(found['input'])[:60]}", f"it {reason.removeprefix('Input ')}"
    else:
        message, fix = f"{key}: {reason}" if key else reason, "`soco-export recipes show` prints every key"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return RecipeError(message + more, fix=fix, where=_origin(key, origins))


def _key_of(loc: tuple[int | str, ...], unknown: bool) -> str:
    """The dotted key of a pydantic location, without the names of union members that pydantic appends."""
    known = set(keys())
    parts = [str(part) for part in loc]
    last = len(parts) - unknown
    while last > 1 and ".".join(parts[:last]) not in known:
        last -= 1
    return ".".join(parts[:last] + (parts[-1:] if unknown else []))


def _nearest_key(wrong: str) -> str:
    known = list(keys())
    parent, _, last = wrong.rpartition(".")
    prefix = f"{parent}." if parent else ""
    siblings = {key.removeprefix(prefix): key for key in known if key.startswith(prefix)}
    near = difflib.get_close_matches(last, list(siblings), n=1, cutoff=0.6)
    if near:
        return f"did you mean {siblings[near[0]]}?"
    # the first section that has such a key wins
    elsewhere = {key.rpartition(".")[2]: key for key in reversed(known)}
    near = difflib.get_close_matches(last, list(elsewhere), n=1, cutoff=0.8)
    return f"did you mean {elsewhere[near[0]]}?" if near else "`soco-export recipes show` prints every key"


def _origin(key: str, origins: Origins) -> str:
    """Where a key was written: its own line, that of something in it, or else the nearest section's."""
    at = next((written for written in origins if f"{written}.".startswith(f"{key}.")), key)
    while at and at not in origins:
        at = at.rpartition(".")[0]
    place = origins.get(at, "recipe")
    return place if place.startswith("--set") else f"{place}: {key}"
