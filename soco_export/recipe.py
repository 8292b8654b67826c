"""YAML → Recipe: everything a run does, in one frozen value.

A recipe is a chain of YAML files (`extends:`, deep-merged, the nearer file wins) plus `--set key=value` overrides.
It is looked up by name among the shipped recipes or given as a path. `lock` writes it back with everything resolved;
loading a lock file gives the equal recipe. Paths inside a recipe are relative to the working directory.
Imports pydantic and yaml only, so that `--help` and `recipes list` stay fast.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError

from soco_export.bench.settings import BenchSettings, LatencySettings
from soco_export.gate import GateSettings
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe_yaml import Origins, read_yaml, read_yaml_value, write_yaml
from soco_export.validate.settings import ValidateSettings
from soco_train.errors import RecipeError
from soco_train.settings import DataSettings, LayerSettings, PlanSettings, RefineSettings, Section, TrainSettings

LOCK_HEADER = "# Every setting of the run, resolved. Give it back with --recipe to run the same again.\n"
TEXT_SOURCES = ("path", "hub", "builtin")


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

    @property
    def plan(self) -> PlanSettings:
        """The plan's settings alone."""
        return PlanSettings(**{key: getattr(self, key) for key in PlanSettings.model_fields})

    def replace(self, changes: Mapping[str, Any], where: str = "recipe") -> Recipe:
        """Return a copy with dotted keys set, validated: `recipe.replace({"train.steps": 4})`."""
        values = self.model_dump(mode="json", by_alias=True)
        for key, value in changes.items():
            values = _with(values, key, value)
        return _validate(values, {key: where for key in changes})

    def override(self, overrides: Sequence[str]) -> Recipe:
        """Return a copy with each `key=value` of `--set` applied, validated."""
        values, origins = _overridden(self.model_dump(mode="json", by_alias=True), overrides)
        return _validate(values, origins)


def load_recipe(
    source: str | Path,
    overrides: Sequence[str] = (),
    overlay: Path | None = None,
    name: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe by shipped name or path; lay `overlay` (a file), `model` fields and `key=value` overrides over it.

    `name` renames the result. Raises RecipeError: unknown recipe, cycle, misspelt key, value out of range.
    """
    values, origins = _read_chain(find_recipe(source), ())
    for file in () if overlay is None else (overlay,):
        above, above_origins = _read_chain(find_recipe(file), ())
        values, origins = _merge(values, above), {**origins, **above_origins}
    for field, value in (model or {}).items():
        values = _with(values, f"model.{field}", value)
    values, override_origins = _overridden(values, overrides)
    origins = {**origins, **override_origins}
    values["name"] = name or values.get("name") or find_recipe(source).name.removesuffix(".yaml")
    return _validate(values, origins)


def find_recipe(source: str | Path) -> Path:
    """Return the file of a shipped recipe (by name) or of a path; RecipeError with the nearest name otherwise."""
    shipped = list_recipes(abstract=True)
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if path.is_file():
        return path
    raise RecipeError(
        f"there is no recipe {str(source)!r}",
        fix=f"{suggestion(str(source), shipped)}give a file, or one of: {', '.join(list_recipes())}",
        where=f"looked in {recipes_folder()} and at {path}",
    )


def recipes_folder() -> Path:
    """Where the shipped recipes are: inside the installed package, or at the top of a source tree."""
    package = Path(__file__).parent
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def list_recipes(abstract: bool = False) -> dict[str, Path]:
    """Return the shipped recipes by name; `abstract` adds those that only serve `extends:` (base, methods/…)."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"))
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {name: file for name, file in names.items() if abstract or not ("/" in name or name == "base")}


def lock(recipe: Recipe) -> str:
    """Return the recipe as YAML with everything resolved; `load_recipe` of it gives the equal recipe."""
    values = recipe.model_dump(mode="json", by_alias=True)
    ordered = {"name": values.pop("name"), **values}
    return LOCK_HEADER + write_yaml(ordered)


def schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, for editors."""
    return Recipe.model_json_schema(by_alias=True)


def keys(section: type[BaseModel] = Recipe, prefix: str = "") -> Iterator[str]:
    """Yield every dotted key a recipe may hold, in order."""
    for field, info in section.model_fields.items():
        key = f"{prefix}{info.alias or field}"
        yield key
        inner = _section_of(info.annotation)
        if inner is not None:
            yield from keys(inner, f"{key}.")


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = (annotation, *get_args(annotation))
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def suggestion(wrong: str, right: Sequence[str] | Mapping[str, Any]) -> str:
    """Return "did you mean x? " or nothing."""
    near = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""


def _read_chain(file: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """Read a file over everything it extends."""
    file = file.resolve()
    if file in seen:
        chain = " → ".join(path.name for path in (*seen, file))
        raise RecipeError(f"recipes extend each other in a circle: {chain}", fix="break the circle", where=str(file))
    own, own_origins = read_yaml(file)
    parents = own.pop("extends", [])
    values: dict[str, Any] = {}
    origins: Origins = {}
    for parent in [parents] if isinstance(parents, str) else parents:
        beside = file.parent / parent
        below, below_origins = _read_chain(beside if beside.is_file() else find_recipe(parent), (*seen, file))
        values, origins = _merge(values, below), {**origins, **below_origins}
    # a parent's name is not its child's
    values.pop("name", None)
    return _merge(values, own), {**origins, **own_origins}


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Deep-merge two mappings; a text source in `above` displaces the other kinds of source in `below`."""
    merged = dict(below)
    if any(above.get(source) is not None for source in TEXT_SOURCES):
        merged = {key: value for key, value in merged.items() if key not in TEXT_SOURCES}
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _overridden(values: Mapping[str, Any], overrides: Sequence[str]) -> tuple[dict[str, Any], Origins]:
    changed, origins = dict(values), {}
    for override in overrides:
        key, value = _parse_override(override)
        changed = _merge(changed, _nested(key, value))
        origins[key] = f"--set {override}"
    return changed, origins


def _parse_override(override: str) -> tuple[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"cannot read the override {override!r}", fix="write --set key=value", where="--set")
    return key.strip(), read_yaml_value(text, f"--set {override}")


def _nested(key: str, value: Any) -> dict[str, Any]:
    for part in reversed(key.split(".")):
        value = {part: value}
    return dict(value)


def _with(values: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """Set one dotted key, the whole of it."""
    head, _, rest = key.partition(".")
    return {**values, head: _with(values.get(head) or {}, rest, value) if rest else value}


def _validate(values: Mapping[str, Any], origins: Origins) -> Recipe:
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
        message, fix = f"{key} cannot be {found['input']!r}", f"it {reason.removeprefix('Input ')}"
    else:
        message, fix = f"{key}: {reason}", "`soco-export recipes show` prints every key"
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
