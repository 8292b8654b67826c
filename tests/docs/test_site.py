"""The documentation site: its pages are all reachable, its reference is that of the code, and it builds."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

from soco_export import calling, cli
from soco_export.recipe.recipe import Recipe, keys
from tools.docs_reference import options, recipe_keys

ROOT = Path(__file__).parents[2]
NEW = ("quickstart", "howto-own-model", "howto-7b", "howto-size", "howto-ci")
SHELL = re.compile(r"^(?: {4})?(soco-export .*)$", re.MULTILINE)
COMMANDS = sorted({line for page in NEW for line in SHELL.findall((ROOT / "docs" / f"{page}.md").read_text())})


def test_every_page_is_in_the_navigation_and_no_other() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text().split("nav:")[1]
    named = {page for page in re.findall(r"[\w/-]+\.md", navigation) if not page.startswith("reference/")}
    assert named == {file.name for file in (ROOT / "docs").glob("*.md")}


def test_the_reference_names_every_verb_and_every_key() -> None:
    page = recipe_keys()
    every = list(keys())
    leaves = {key for key in every if not any(other.startswith(f"{key}.") for other in every)}
    assert {key for key in leaves if f"| `{key}` |" not in page} == set()
    assert "| `train.score_function` | `relu`, `softplus`, `sigmoid2` |" in page
    assert "soco-export train-and-export" in options()
    assert "## recipes list" in options()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_guides_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(calling, "_call", lambda verb, options: called.append(verb))
    cli.app(shlex.split(command)[1:], standalone_mode=False)
    assert len(called) == 1


def test_the_recipe_of_the_guide_is_one(tmp_path: Path) -> None:
    from soco_export.recipe.load import load_recipe

    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "howto-own-model.md").read_text(), re.DOTALL)
    assert yaml.safe_load(block)
    (tmp_path / "mine.yaml").write_text(block)
    recipe = load_recipe(tmp_path / "mine.yaml")
    assert isinstance(recipe, Recipe)
    assert (str(recipe.data.path), recipe.data.hub, recipe.train.basis) == ("train.txt", None, "two-sided")


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="no mkdocs here: pip install '.[docs]'")
def test_the_site_builds(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "keys" / "index.html").is_file()
