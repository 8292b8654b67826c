"""YAML files → Recipe, and back as a lock file.

A recipe is a chain of YAML files (`extends:`, deep-merged, the nearer file wins) plus `--set key=value` overrides.
It is looked up by name among the package's recipes or given as a path. `lock` writes it back with everything resolved;
loading a lock file gives the equal recipe. Paths inside a recipe are relative to the working directory.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soco_export.recipe.merge import merge, overridden, with_key
from soco_export.recipe.recipe import Recipe, validated
from soco_export.recipe.yaml import Origins, read_yaml, write_yaml
from soco_train.errors import RecipeError

LONGEST_CHAIN = 8  # recipes that extend each other
MOST_PARENTS = 4
LOCK_HEADER = "# Every setting of the run, resolved. Give it back with --recipe to run the same again.\n"


def load_recipe(
    source: str | Path,
    overrides: Sequence[str] = (),
    overlay: Path | None = None,
    name: str | None = None,
    model: Mapping[str, Any] | None = None,
) -> Recipe:
    """Read a recipe by name or path; lay `overlay` (a file), `model` fields and `key=value` overrides over it.

    `name` renames the result. Raises RecipeError: unknown recipe, cycle, misspelt key, value out of range.
    """
    values, origins = _read_chain(find_recipe(source), ())
    for file in () if overlay is None else (overlay,):
        above, above_origins = _read_chain(find_recipe(file), ())
        values, origins = merge(values, above), {**origins, **above_origins}
    for field, value in (model or {}).items():
        values = with_key(values, f"model.{field}", value)
    values, override_origins = overridden(values, overrides)
    origins = {**origins, **override_origins}
    values["name"] = name or values.get("name") or find_recipe(source).name.removesuffix(".yaml")
    return validated(values, origins)


def find_recipe(source: str | Path) -> Path:
    """Return the file of a recipe of ours (by name) or of a path; RecipeError with the nearest name otherwise."""
    shipped = list_recipes(abstract=True)
    if str(source) in shipped:
        return shipped[str(source)]
    path = Path(source)
    if _is_file(path):
        return path
    raise RecipeError(
        f"there is no recipe {str(source)!r}",
        fix=f"{suggestion(str(source), shipped)}give a file, or one of: {', '.join(list_recipes())}",
        where=f"looked in {recipes_folder()} and at {path}",
    )


def _is_file(path: Path) -> bool:
    """Return whether there is such a file, a pipe included; a name that no file system takes is none."""
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):
        return False


def recipes_folder() -> Path:
    """Where the package's recipes are: inside the installed package, or at the top of a source tree."""
    package = Path(__file__).parents[1]
    return package / "recipes" if (package / "recipes").is_dir() else package.parent / "recipes"


def list_recipes(abstract: bool = False) -> dict[str, Path]:
    """Return the package's recipes by name; `abstract` adds those that only serve `extends:` (base, methods/…)."""
    folder = recipes_folder()
    files = sorted(folder.rglob("*.yaml"))
    names = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
    return {name: file for name, file in names.items() if abstract or not ("/" in name or name == "base")}


def list_overlays() -> dict[str, Path]:
    """Return the package's recipes that name no model and are laid over one (`--recipe`): methods/…, shared/…."""
    return {name: file for name, file in list_recipes(abstract=True).items() if "/" in name}


def read_overlay(name: str) -> dict[str, Any]:
    """Return the settings of an overlay, its parents' merged in, and nothing of a model's or of the defaults."""
    return _read_chain(list_overlays()[name], ())[0]


def lock(recipe: Recipe) -> str:
    """Return the recipe as YAML with everything resolved; `load_recipe` of it gives the equal recipe."""
    return lock_text(recipe.as_values())


def lock_text(values: Mapping[str, Any]) -> str:
    """Return what `lock` does, of a recipe's values."""
    return LOCK_HEADER + write_yaml({"name": values["name"], **values})


def suggestion(wrong: str, right: Sequence[str] | Mapping[str, Any]) -> str:
    """Return "did you mean x? " or nothing."""
    near = difflib.get_close_matches(wrong, list(right), n=1, cutoff=0.6)
    return f"did you mean {near[0]}? " if near else ""


def _read_chain(file: Path, seen: tuple[Path, ...]) -> tuple[dict[str, Any], Origins]:
    """Read a file over everything it extends."""
    file = file.resolve()
    if len(seen) >= LONGEST_CHAIN:
        raise RecipeError(
            f"recipes extend each other more than {LONGEST_CHAIN} deep", fix="shorten the chain", where=str(file)
        )
    if file in seen:
        chain = " → ".join(path.name for path in (*seen, file))
        raise RecipeError(f"recipes extend each other in a circle: {chain}", fix="break the circle", where=str(file))
    own, own_origins = read_yaml(file)
    parents = _parents(own.pop("extends", []), own_origins.get("extends", ""))
    values: dict[str, Any] = {}
    origins: Origins = {}
    for parent in parents:
        beside = file.parent / parent
        below, below_origins = _read_chain(beside if _is_file(beside) else find_recipe(parent), (*seen, file))
        values, origins = merge(values, below), {**origins, **below_origins}
    # a parent's name is not its child's
    values.pop("name", None)
    return merge(values, own), {**origins, **own_origins}


def _parents(found: Any, where: str) -> list[str]:
    """Return the names after `extends:`; RecipeError if they are none, or so many that reading them takes long."""
    names = [found] if isinstance(found, str) else found
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(names) > MOST_PARENTS:
        raise RecipeError(
            f"extends: {str(found)[:60]} is no name, and no list of up to {MOST_PARENTS} names",
            fix="extends: base",
            where=where,
        )
    return names
