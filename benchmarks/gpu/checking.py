"""Do here what the calls do there, measurements apart, and hold plan and sizes to their limits."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from benchmarks.gpu.packing import MIB, PLAN
from benchmarks.gpu.parcels import Cargo, read_list
from benchmarks.gpu.source import ROOT, tracked_bytes


def check(options: argparse.Namespace) -> None:
    """Join all loads in a folder that is thrown away, load the model, look at the limits; exit with what is wrong."""
    document = json.loads((options.folder / PLAN).read_text(encoding="utf-8"))
    wrong = list(_wrong_with(document, options))
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder)
        for call in document["calls"]:
            if call["carry"]:
                _python(str(ROOT / "tools" / "gpu-carry"), "join", call["carry"], str(store))
        missing = [file.name for file in _cargo(document) if not (store / file.name).exists()]
        wrong += [f"{name} did not arrive" for name in missing]
        if (store / "model").exists():
            _python("-m", "benchmarks.gpu.gguf_model", str(store / "model"))
    if wrong:
        sys.exit("\n".join(wrong))
    print(f"all loads join to what was packed; {document['taken']:.0f} s at most")


def _cargo(document: Mapping[str, Any]) -> list[Cargo]:
    carried = [call["carry"] for call in document["calls"] if call["carry"]]
    return read_list(Path(carried[0])) if carried else []


def _python(*words: str) -> None:
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


def _wrong_with(document: Mapping[str, Any], options: argparse.Namespace) -> Iterator[str]:
    """Yield what breaks a limit: time, a call's length, the door, or a package that nobody brings."""
    checkout = tracked_bytes()
    if document["taken"] > document["total"]:
        yield f"{document['taken']} s of {document['total']}"
    for number, call in enumerate(document["calls"], start=1):
        if call["limit"] > document["longest"]:
            yield f"call {number} may take {call['limit']} s of {document['longest']}"
        carried = sum(path.stat().st_size for path in Path(call["carry"]).iterdir()) if call["carry"] else 0
        if carried + checkout > options.door * MIB:
            yield f"call {number} carries {carried / MIB:.1f} MiB beside a checkout of {checkout / MIB:.1f}"
    if options.there:
        yield from _absent(options.there, _cargo(document))


def _absent(there: Path, cargo: Sequence[Cargo]) -> Iterator[str]:
    """Yield the packages that this one and what is carried need, and that are neither there nor carried.

    What is there has what it needs.
    """
    carried = {_plain(file.name.split("-")[0]) for file in cargo if file.name.endswith(".whl")}
    have = {_plain(name) for name in re.split(r"[\s,]+", there.read_text(encoding="utf-8").strip())} | carried
    for name in sorted({need for package in ("soco-export", *carried) for need in _needs(package)} - have):
        yield f"{name} is neither there nor carried"


def _needs(name: str) -> Iterator[str]:
    """Yield what an installed package asks for without extras; nothing for one that is not installed here."""
    try:
        found = [Requirement(text) for text in metadata.requires(name) or []]
    except metadata.PackageNotFoundError:
        return
    yield from (_plain(need.name) for need in found if need.marker is None or need.marker.evaluate({"extra": ""}))


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
