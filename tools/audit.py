"""Known vulnerabilities of what is installed here, from a database on this disk: no network, nothing sent.

    SOCO_ADVISORIES=advisory-database/vulns python tools/audit.py

The folder holds advisories in the OSV format (https://ossf.github.io/osv-schema/) as JSON or YAML, such as a checkout
of github.com/pypa/advisory-database or the unpacked PyPI/all.zip of osv.dev. Exit code 1: something installed is
affected. Without a database nothing is checked, which is said. To look online instead: pip-audit.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml
from packaging.version import InvalidVersion, Version


def main() -> int:
    """Print each advisory that meets an installed version; return the exit code."""
    folder = os.environ.get("SOCO_ADVISORIES")
    if not folder:
        say("skipped: no database of advisories here (SOCO_ADVISORIES=FOLDER names one)")
        return 0
    installed = {_normal(found.metadata["Name"]): found.version for found in distributions()}
    files = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".json", ".yaml", ".yml"))
    if not files:
        say(f"{folder} holds no advisories")
        return 1
    found = [line for path in files for line in affected(_read(path), installed)]
    say("\n".join(found) or f"none of {len(files):,} advisories meets one of {len(installed)} installed packages")
    return int(bool(found))


def affected(advisory: Mapping[str, Any], installed: Mapping[str, str]) -> Iterator[str]:
    """Yield a line for each installed package that an advisory, not withdrawn, is about in its version."""
    if "withdrawn" in advisory:
        return
    for part in advisory.get("affected", ()):
        package = part.get("package", {})
        name = _normal(package.get("name", ""))
        if package.get("ecosystem") == "PyPI" and name in installed and is_affected(part, installed[name]):
            known = ", ".join([advisory["id"], *advisory.get("aliases", ())])
            yield f"{name} {installed[name]}: {known}: {advisory.get('summary') or advisory.get('details', '')[:200]}"


def is_affected(part: Mapping[str, Any], version: str) -> bool:
    """Tell whether a version is among those listed, or within one of the ranges."""
    if version in part.get("versions", ()):
        return True
    return any(_within(found["events"], version) for found in part.get("ranges", ()) if found["type"] == "ECOSYSTEM")


def _within(events: list[Mapping[str, str]], version: str) -> bool:
    """Walk through the events of a range in order: from `introduced` on, until `fixed`, or after `last_affected`."""
    try:
        here, inside = Version(version), False
        for kind, at in sorted((item for event in events for item in event.items()), key=lambda item: Version(item[1])):
            if kind == "introduced" and here >= Version(at):
                inside = True
            elif (kind == "fixed" and here >= Version(at)) or (kind == "last_affected" and here > Version(at)):
                inside = False
    except InvalidVersion:
        return False
    return inside


def say(line: str) -> None:
    """Print a line."""
    sys.stdout.write(f"{line}\n")


def _read(path: Path) -> Mapping[str, Any]:
    text = path.read_text(encoding="utf-8")
    found = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    return found if isinstance(found, dict) else {}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
