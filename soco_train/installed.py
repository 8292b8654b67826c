"""How this package was installed, so that a printed `pip install` line works where it is printed."""

from __future__ import annotations

import json
import shlex
from urllib.parse import unquote, urlsplit

PACKAGE = "soco-export"


def install_command(extra: str) -> str:
    """Return the pip command that adds `extra` of this package from where the package itself came.

    From a folder (`pip install .`, editable or not) it names that folder, from version control its address, else the
    package's name. Source: the direct_url.json that pip writes (PEP 610).
    """
    return f"pip install {shlex.quote(requirement(extra, _origin()))}"


def requirement(extra: str, origin: dict[str, object]) -> str:
    """Return what to hand to pip for `extra`, given the content of direct_url.json ({}: from a package index)."""
    url = str(origin.get("url", ""))
    if url.startswith("file:"):
        return f"{unquote(urlsplit(url).path)}[{extra}]"
    source = origin.get("vcs_info")
    if isinstance(source, dict):
        return f"{PACKAGE}[{extra}] @ {source.get('vcs')}+{url}"
    return f"{PACKAGE}[{extra}]" + (f" @ {url}" if url else "")


def version() -> str:
    """Return the installed version of this package, "unknown" in a source tree that is not installed."""
    return version_of(PACKAGE) or "unknown"


def version_of(package: str) -> str | None:
    """Return the installed version of a distribution, None if it is not installed."""
    from importlib import metadata  # a quarter of what --help takes

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _origin() -> dict[str, object]:
    from importlib import metadata

    try:
        text = metadata.distribution(PACKAGE).read_text("direct_url.json")
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, object] = json.loads(text) if text else {}
    return found
