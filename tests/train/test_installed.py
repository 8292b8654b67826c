"""The pip lines that are printed work where they are printed."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from soco_train.installed import install_command, requirement, version

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({}, "soco-export[gpu]"),
        ({"url": "file:///home/me/my%20code/soco-export", "dir_info": {}}, "/home/me/my code/soco-export[gpu]"),
        (
            {"url": "https://example.org/soco-export", "vcs_info": {"vcs": "git", "commit_id": "1"}},
            "soco-export[gpu] @ git+https://example.org/soco-export",
        ),
        ({"url": "https://example.org/s.whl", "archive_info": {}}, "soco-export[gpu] @ https://example.org/s.whl"),
    ],
)
def test_an_extra_comes_from_where_the_package_came(origin: dict[str, object], expected: str) -> None:
    assert requirement("gpu", origin) == expected


def test_the_line_is_one_argument_for_a_shell() -> None:
    pip, install, argument = shlex.split(install_command("gpu"))
    assert (pip, install) == ("pip", "install")
    assert argument.endswith("[gpu]")


def test_every_extra_that_a_message_names_exists() -> None:
    declared = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE))
    sources = [*ROOT.glob("soco_*/**/*.py")]
    named = {name for file in sources for name in re.findall(r'install_command\("(\w+)"\)', file.read_text("utf-8"))}
    assert named
    assert named <= declared


def test_no_message_names_the_package_on_an_index_it_is_not_on() -> None:
    texts = [*ROOT.glob("soco_*/**/*.py"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/*.yml"), ROOT / "README.md"]
    found = [file for file in texts if re.search(r"pip install ['\"]?soco-export\[", file.read_text(encoding="utf-8"))]
    assert found == []


def test_the_version_is_that_of_the_project() -> None:
    assert f'version = "{version()}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
