"""YAML as recipes use it: every key remembers its file and line, a key given twice is refused, 1e-5 is a number."""

from __future__ import annotations

import re
from collections.abc import Hashable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from soco_export.files.text import as_yaml
from soco_train.bounded import read_text
from soco_train.errors import DataError, RecipeError

# dotted key → "file:line", or the command-line flag that set it
Origins = dict[str, str]
_MOST_BYTES = 256 << 10  # of one recipe file
_DEEPEST = 32
MOST_EVENTS = 10_000


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-5 as a float, as YAML 1.2 and every user does (YAML 1.1 wants 1.0e-5)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag != "tag:yaml.org,2002:str":
                raise yaml.constructor.ConstructorError(None, None, "a key is not a name", key_node.start_mark)
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key_node.value!r} is given twice", key_node.start_mark
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes what _Loader would read as a number, and writes what occurs twice out twice."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def write_yaml(values: dict[str, Any]) -> str:
    """Return the values as YAML, in their order; `read_yaml` of it gives the equal values."""
    return as_yaml(values, _Dumper, width=110)


def read_yaml(file: Path) -> tuple[dict[str, Any], Origins]:
    """Return the mapping in `file` and where each key stands; RecipeError if it is unreadable or no mapping."""
    shown = _shown(file)
    try:
        text = read_text(file, "give a readable UTF-8 file", _MOST_BYTES)
    except DataError as error:
        raise RecipeError(error.message, fix=error.fix, where=shown) from error
    values, node = _parsed(text, shown)
    if node is None:
        return {}, {}
    if not isinstance(values, dict):
        raise RecipeError("the recipe is no mapping of keys to values", fix="see `recipes show`", where=shown)
    return deepcopy(values), dict(_lines(node, "", shown))


def read_yaml_value(text: str, where: str) -> Any:
    """Return the YAML value of one override; RecipeError if it does not parse."""
    return deepcopy(_parsed(text, where)[0])


@lru_cache(maxsize=128)  # to find the recipe of a model's folder all are read, and each reads the ones it extends
def _parsed(text: str, where: str) -> tuple[Any, yaml.Node | None]:
    """Return (value, node) of a YAML text without aliases, of bounded depth and length; RecipeError for any other.

    Both belong to the cache: who changes the value takes a copy.
    """
    try:
        _check_events(text, where)
        loader = _Loader(text)
        node = loader.get_single_node()
        return (None if node is None else loader.construct_document(node)), node
    except yaml.MarkedYAMLError as error:
        raise _broken(error, where) from None
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        reason = (str(error).splitlines() or [""])[0][:200]
        raise RecipeError(f"not valid YAML: {reason}", fix="correct the value", where=where) from None


def _check_events(text: str, where: str) -> None:
    """Raise RecipeError for an alias, deep nesting or too many values, before anything is built from the text."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, yaml.SafeLoader)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        faults = {
            "an alias (*name)": isinstance(event, yaml.AliasEvent),
            f"nesting deeper than {_DEEPEST}": depth > _DEEPEST,
            f"more than {MOST_EVENTS:,} values": count > MOST_EVENTS,
        }
        for fault in (fault for fault, there in faults.items() if there):
            line = "" if where.startswith("--set") or not event.start_mark else f":{event.start_mark.line + 1}"
            raise RecipeError(
                f"the recipe has {fault}, which recipes do without",
                fix="write it out, or shorten it",
                where=where + line,
            )


def _broken(error: yaml.MarkedYAMLError, where: str) -> RecipeError:
    line = f":{error.problem_mark.line + 1}" if error.problem_mark and not where.startswith("--set") else ""
    return RecipeError(f"not valid YAML: {error.problem}", fix="correct the line", where=f"{where}{line}")


def _lines(node: yaml.Node, prefix: str, file: str) -> list[tuple[str, str]]:
    if not isinstance(node, yaml.MappingNode):
        return []
    found: list[tuple[str, str]] = []
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        found.append((name, f"{file}:{key.start_mark.line + 1}"))
        found += _lines(value, f"{name}.", file)
    return found


def _shown(file: Path) -> str:
    """The path as short as it can be said: relative to the working directory where it lies inside."""
    try:
        return str(file.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(file)
