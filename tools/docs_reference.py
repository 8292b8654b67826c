"""Reference pages of the documentation site, made from the code when it is built (a hook of mkdocs; `make docs`).

reference/options.md  each verb with its help text, as `--help` prints it
reference/keys.md     each recipe key with its type, allowed values and default, from the recipe's JSON schema
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages to those of docs/."""
    from mkdocs.structure.files import File

    for name, text in {"options": options(), "keys": recipe_keys()}.items():
        files.append(File.generated(config, f"reference/{name}.md", content=text))
    return files


def options() -> str:
    """Return one section of help text for each verb."""
    from typer.main import get_command

    from soco_export.cli import app

    sections = ["# Every option", "What `soco-export VERB --help` prints."]
    for name, command in sorted(_leaves(get_command(app), "")):
        context = command.make_context(f"soco-export {name}", [], resilient_parsing=True)
        sections.append(f"## {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(sections) + "\n"


def _leaves(command: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, child in command.commands.items():
        if hasattr(child, "commands"):
            yield from _leaves(child, f"{prefix}{name} ")
        else:
            yield f"{prefix}{name}", child


def recipe_keys() -> str:
    """Return a table of all recipe keys: what each takes, and its default."""
    from soco_export.recipe.recipe import schema

    whole = schema()
    found = [*_rows(whole, whole, ""), *_rows_of_steps()]
    rows = (f"| `{key}` | {kind} | {default} |" for key, kind, default in found)
    head = (
        "# Every recipe key\n\nWhat each means: [recipes](../recipes.md).\n\n| key | takes | default |\n|---|---|---|\n"
    )
    return head + "\n".join(rows) + "\n"


def _rows(node: Mapping[str, Any], whole: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, value in node["properties"].items():
        # a list of tables has the keys of one of them
        resolved = _resolved(value.get("items", value), whole)
        if "properties" in resolved:
            yield from _rows(resolved, whole, f"{prefix}{name}.")
        else:
            default = f"`{value['default']}`" if value.get("default") is not None else ""
            yield f"{prefix}{name}", takes(value, whole), default


def _rows_of_steps() -> Iterator[tuple[str, str, str]]:
    """Yield the keys of the sections that scorers and refinement steps register for themselves."""
    import soco_train.refine
    import soco_train.scores  # noqa: F401
    from soco_train.settings.refine import RefineSettings
    from soco_train.settings.train import TrainSettings

    for owner, settings in {"train": TrainSettings, "refine": RefineSettings}.items():
        for name, section in settings.of_steps.items():
            own = section.model_json_schema()
            yield from _rows(own, own, f"{owner}.{name}.")


def _resolved(value: Mapping[str, Any], whole: Mapping[str, Any]) -> Mapping[str, Any]:
    reference = value.get("$ref")
    return whole["$defs"][reference.rsplit("/", 1)[1]] if reference else value


def takes(value: Mapping[str, Any], whole: Mapping[str, Any]) -> str:
    """Return the values of a key in words: its type, its list of words, its limits."""
    value = _resolved(value, whole)
    if "anyOf" in value:
        return " or ".join(dict.fromkeys(takes(part, whole) for part in value["anyOf"]))
    if "enum" in value or "const" in value:
        return ", ".join(f"`{word}`" for word in value.get("enum", [value.get("const")]))
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    said = [f"{sign} {value[key]}" for key, sign in limits.items() if key in value]
    kind = {"null": "nothing", "array": "list", "object": "table"}.get(value.get("type", ""), value.get("type", "any"))
    return " ".join([kind, *said])
