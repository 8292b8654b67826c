"""No two files import each other, by whatever way round, imports inside functions included."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[2]


def files() -> dict[str, Path]:
    """Return every file of both packages by its module's name."""
    found = [path for package in ("soco_train", "soco_export") for path in (ROOT / package).rglob("*.py")]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in found}


def imports(path: Path, known: dict[str, Path], module: str) -> set[str]:
    """Return the modules of ours that a file imports, those for types alone included.

    `from package import name` means the package only if `name` is no module of it.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in known else str(node.module) for name in names}
    return (found & known.keys()) - {module}


def test_no_circle_of_files() -> None:
    known = files()
    graph = {module: imports(path, known, module) for module, path in known.items()}
    assert sum(map(len, graph.values())) > 300  # it did look
    # a package's own front door names what lies behind it, for readers of types; nothing inside goes through it
    for package in ("soco_train", "soco_export"):
        graph[package] -= {module for module in graph[package] if module != "soco_export.autoload"}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        circle = " → ".join(reversed(error.args[1]))
        raise AssertionError(f"files import each other: {circle}") from None
