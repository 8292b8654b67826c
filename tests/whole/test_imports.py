"""No two files import each other, by whatever way round, and no public name means two things."""

from __future__ import annotations

import ast
from collections import defaultdict
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


# One thing in two files: a verb behind its command, the Python API before the conductor, a stage that calls it, a plot.
SAME_SENSE = (
    ("soco_export.cli", "soco_export.run.verbs", "soco_export.report.choose"),
    ("soco_export.__main__", "soco_export.cli"),
    ("soco_train.api", "soco_train.method", "soco_train.refine.cut", "soco_export.run.stages"),
    ("soco_export.report.draw",),
)


def public_names(path: Path) -> set[str]:
    """Return what a module defines for others; what a decorator enters in a register goes by its name there."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) or (isinstance(node, ast.FunctionDef) and not node.decorator_list):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
    return {name for name in found if not name.startswith("_")}


def test_no_public_name_means_two_things() -> None:
    where: defaultdict[str, list[str]] = defaultdict(list)
    for module, path in files().items():
        for name in public_names(path):
            where[name].append(module)
    twice = {
        name: modules
        for name, modules in where.items()
        if len(modules) > 1 and not any(all(m.startswith(same) for m in modules) for same in SAME_SENSE)
    }
    assert not twice
    assert len(where) > 1000  # it did look
