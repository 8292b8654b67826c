"""The reference pages name everything there is, and nothing else."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

from typer.main import get_command

from soco_export.cli import app
from soco_export.recipe.recipe import Recipe, keys
from soco_export.recipe.yaml import read_yaml_value
from soco_export.report.baseline import RULES
from soco_train import refine, scores
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings

STEPS = (scores, refine)  # importing them registers the sections of their own
COMMON = {"--json", "--quiet", "--verbose"}
DOCS = Path(__file__).parents[2] / "docs"
REQUIRED = {"name": "any", "model": {}, "data": {"builtin": "speeches"}, "evaluation": {"builtin": "speeches"}}
NOTHING = re.compile(r"\b(all|none|off)\b")  # how the table writes None
IN_WORDS = ('the file\'s name, ""', "latency.json in the run", "blocks; heads, embeddings, norms")


def test_every_recipe_key_is_documented_and_no_other() -> None:
    rows = re.findall(r"^\| (`[^|]*)\|", (DOCS / "recipes.md").read_text(encoding="utf-8"), re.MULTILINE)
    documented = [key for row in rows for key in re.findall(r"`([^`]+)`", row)]
    every = list(keys())
    leaves = {key for key in every if not any(other.startswith(f"{key}.") for other in every)}
    assert sorted(documented) == sorted(leaves)


def test_every_default_in_the_table_is_that_of_the_code() -> None:
    page = (DOCS / "recipes.md").read_text(encoding="utf-8")
    values = Recipe.model_validate(REQUIRED).model_dump(mode="json", by_alias=True)
    for owner, settings in {"train": TrainSettings, "refine": RefineSettings}.items():
        for name, section in settings.of_steps.items():
            values[owner].setdefault(name, section().model_dump(mode="json"))
    compared = 0
    for names, cell in re.findall(r"^\| (`[^|]*) \| ?([^|]*?) ?\|", page, re.MULTILINE):
        if not cell or cell in IN_WORDS:
            continue
        told = read_yaml_value(f"[{NOTHING.sub('null', cell)}]", "docs/recipes.md")
        own = re.findall(r"`([^`]+)`", names)
        for key, value in zip(own, told * len(own) if len(told) == 1 else told, strict=True):
            found = reduce(lambda section, part: section[part], key.split("."), values)
            assert found == value, key
            compared += 1
    assert compared > 70


def test_every_allowance_beside_a_baseline_is_that_of_the_code() -> None:
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    told = page.partition("| figure | may be worse by |\n")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (`[^|]*`) \| ([\d.]+)( %)?", told, re.MULTILINE)
    documented = {
        name: (float(value) / 100 if percent else float(value), bool(percent))
        for names, value, percent in rows
        for name in re.findall(r"`([^`]+)`", names)
    }
    assert documented == {rule.figures: (rule.allowed, rule.relative) for rule in RULES}


def test_every_verb_and_flag_is_documented_and_no_other() -> None:
    page = (DOCS / "cli.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^### (\S+)\n(.*?)(?=^### |\Z)", page, re.MULTILINE | re.DOTALL))
    documented = {verb: set(re.findall(r"`(--[\w-]+)`", flags_of(text))) for verb, text in sections.items()}
    assert documented == {verb: long_options(command) - COMMON for verb, command in get_command(app).commands.items()}


def flags_of(section: str) -> str:
    return next((line for line in section.splitlines() if line.startswith("Flags:")), "")


def long_options(command: Any) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts if name.startswith("--")}
