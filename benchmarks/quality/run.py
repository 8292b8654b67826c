"""The benchmark's command line.

    python -m benchmarks.quality --model tiny --keep 0.8,0.6,0.4 --seeds 0,1,2 --out benchmarks/quality/results/tiny

After every cell OUT/results.json and OUT/results.md are written anew from all cells that are done, so that a benchmark
stopped at any moment has a table; the same command skips those cells and goes on. --report writes the table and
measures nothing. Plots: python -m benchmarks.quality.plot OUT.
More texts: --evaluate wikitext2=wiki.test.raw:2048 (or :2048:8 for the first 8 blocks). Tasks are the recipe's:
--set 'validate.tasks=[{path: piqa.jsonl, limit: 200}]'.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from benchmarks.quality.cells import Cell, CellResult, Grid, Perplexity, read_cells
from benchmarks.quality.laboratory import Laboratory
from benchmarks.quality.table import markdown, rows, task_table
from soco_export.evaluate.tasks import summarise_answers
from soco_export.files.atomic import write_atomic
from soco_export.preflight.doctor import versions
from soco_export.recipe.load import load_recipe
from soco_train.errors import RecipeError, SocoError
from soco_train.settings.data import DataSettings

METHODS = {
    "main": (
        *("svd", "fwsvd-outputs", "asvd", "svd-llm", "fisher", "soco-scores"),
        *("svd-llm-distilled", "fisher-distilled", "soco", "soco-pivoted", "acip-merged"),
    ),
    "attribution": (
        *("fisher", "soco-scores", "soco-rescale-only", "soco-select-only", "soco-reallocate-only"),
        *("soco-no-reallocation", "soco-no-deviation"),
        *("soco-phase-1", "soco-phases-1-2", "soco-phases-1-3", "soco-start-ones", "soco-softplus", "soco-sigmoid2"),
        *("soco-plain", "soco-activation", "soco-fisher-rows", "soco-two-sided", "soco-published"),
    ),
    "ladder": ("fisher", "fisher-compensated", "two-sided", "two-sided-refit", "soco-stopping"),
    "tfwsvd": (
        *("svd", "fwsvd", "fwsvd-outputs", "sparsity-aware", "tfwsvd"),
        *("two-sided", "two-sided-refit", "two-sided-fisher-refit"),
    ),
    "easy": ("two-sided-distilled", "two-sided-distilled-easy", "two-sided-distilled-hard"),
    "adapters": ("two-sided", "two-sided-lora", "two-sided-alore", "two-sided-distilled"),
    "relatives": ("fwsvd", "fwsvd-outputs", "acip", "acip-merged"),
    "parts": (
        *("svd-llm-distilled", "two-sided-uniform-distilled", "two-sided-distilled", "two-sided-flattened"),
        *("fisher-distilled", "fisher-price-distilled"),
    ),
    "any-size": ("soco-scores", "soco-any-size"),
}
RESULTS = "results.json"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Header:
    """What the results say of themselves."""

    command: str
    model: str
    machine: str


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, run, and end with the exit code that soco-export would give."""
    try:
        run(parse(argv), print)
    except SocoError as error:
        print(error, file=sys.stderr)
        sys.exit(int(error.code))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--model", default="tiny", help="a recipe by name or path")
    parser.add_argument(
        "--methods", default="main", help=f"{', '.join(METHODS)}, or names in recipes/methods and files"
    )
    parser.add_argument("--keep", type=_numbers(float), default="0.8,0.6,0.4", help="sizes (keep_params)")
    parser.add_argument("--seeds", type=_numbers(int), default="0,1,2")
    parser.add_argument("--effort", type=float, default=1.0, help="multiplies the training steps of every method")
    parser.add_argument(
        "--evaluate",
        action="append",
        default=[],
        metavar="NAME=PATH:BLOCK[:N]",
        help="one more text, its first N blocks",
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a recipe key, in all cells")
    parser.add_argument("--report", action="store_true", help="tables of the cells that are there; measure nothing")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=None, help="shared spectra and scores; default runs/quality/MODEL")
    parser.add_argument("--models", type=Path, help="write each cell's model there, as a Hugging Face folder")
    return parser.parse_args(argv)


def _numbers(kind: Callable[[str], float]) -> Callable[[str], tuple[float, ...]]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def run(options: argparse.Namespace, say: Say) -> list[CellResult]:
    """Bring every cell up to date, in order, and return them; raises SocoError for what a user can mend."""
    names = [name for part in options.methods.split(",") for name in METHODS.get(part, (part,))]
    grid = Grid(options.model, names, options.keep, options.seeds, options.effort, options.set)
    base = load_recipe(options.model, options.set)
    work = options.work or Path("runs") / "quality" / base.name
    texts = dict(named_text(given) for given in options.evaluate)
    laboratory = Laboratory.open(base, texts, work, options.models)
    work.mkdir(parents=True, exist_ok=True)
    header = Header(_command(), base.name, machine())
    known, inputs = read_cells(options.out / RESULTS), laboratory.inputs()
    asked = {cell: next(filter(known.get, keys(cell, inputs)), cell.key(inputs)) for cell in grid.cells()}
    dense = laboratory.dense()
    for number, (cell, key) in enumerate(asked.items(), start=1):
        started, there = time.monotonic(), key in known and (options.report or laboratory.keeps(cell))
        if not there and not options.report:
            known[key] = replace(laboratory.measure(cell), key=key)
            write_results(options.out, header, laboratory, dense, list(asked.values()), known)
        took = "there" if there else "missing" if options.report else f"{time.monotonic() - started:.0f} s"
        say(f"[{number}/{len(asked)}] {cell.title}{_shown(known.get(key))} ({took})")
    return write_results(options.out, header, laboratory, dense, list(asked.values()), known)


def keys(cell: Cell, inputs: Mapping[str, str]) -> tuple[str, str]:
    """Return the keys under which a finished cell may be known."""
    return cell.key(inputs), cell.key(inputs, whole=True)


def _shown(cell: CellResult | None) -> str:
    """Return the perplexities of a finished cell."""
    found = cell.perplexity if cell else {}
    return "".join(f" · {text} {figures.value:.4g}" for text, figures in found.items())


def write_results(
    out: Path,
    header: Header,
    laboratory: Laboratory,
    dense: Mapping[str, Perplexity],
    asked: Collection[str],
    known: Mapping[str, CellResult],
) -> list[CellResult]:
    """Write results.json and results.md of those of `asked` that are `known`, by key, and return those.

    What is known beside, from earlier commands, is kept in results.json.
    """
    cells = [known[key] for key in asked if key in known]
    earlier = [cell for key, cell in known.items() if key not in asked]
    table = rows(cells, dense)
    texts = {name: {"source": b.source, "shape": list(b.tokens.shape)} for name, b in laboratory.texts.items()}
    answers = {name: summarise_answers(own) for name, own in laboratory.dense_answers().items()}
    document = {
        "schema_version": 1,
        **asdict(header),
        "versions": versions(),
        "calibration": {"source": laboratory.calibration.source, "shape": list(laboratory.calibration.tokens.shape)},
        "texts": texts,
        "dense": {text: asdict(figures) for text, figures in dense.items()},
        "dense_tasks": {name: asdict(figures) for name, figures in answers.items()},
        "rows": [asdict(row) for row in table],
        "cells": [asdict(cell) for cell in cells],
        **({"earlier": [asdict(cell) for cell in earlier]} if earlier else {}),
    }
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / RESULTS, json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    write_atomic(
        out / "results.md",
        "\n".join(
            [*_preface(header, laboratory, cells, len(asked)), markdown(table, dense), *task_table(cells, answers)]
        ),
    )
    return cells


def _preface(header: Header, laboratory: Laboratory, cells: Sequence[CellResult], asked: int) -> list[str]:
    lines = [
        f"# Quality: {header.model}\n",
        f"    {header.command}\n",
        f"On {header.machine}. Calibration: {laboratory.calibration.source}.",
        "Mean ± standard deviation (seeds); a method with nothing random in it has one seed. Tokens: those that the",
        "scores and the distillation see together. E = ln(perplexity / dense), E_c that of svd-llm at the same size.\n",
    ]
    if len(cells) < asked:
        lines.append(f"**{len(cells)} of {asked} cells are done**; the same command goes on with the others.\n")
    codes = {cell.code for cell in cells}
    if len(codes) > 1:
        lines.append(f"**These cells were made by {len(codes)} states of the training code** (`code` in each cell).\n")
    for name, blocks in laboratory.texts.items():
        count, block = blocks.tokens.shape
        lines.append(f"- {name}: {blocks.source}, {count} blocks of {block}")
    return [*lines, ""]


def named_text(given: str) -> tuple[str, DataSettings]:
    """Read NAME=PATH:BLOCK or NAME=PATH:BLOCK:N."""
    found = re.fullmatch(r"(?P<name>[^=]+)=(?P<path>.+?):(?P<block>\d+)(:(?P<count>\d+))?", given)
    if found is None:
        raise RecipeError(f"cannot read the text {given!r}", fix="write NAME=PATH:BLOCK[:N]", where="--evaluate")
    blocks = None if found["count"] is None else int(found["count"])
    return found["name"], DataSettings(path=Path(found["path"]), block=int(found["block"]), blocks=blocks)


def _command() -> str:
    return shlex.join(["python", "-m", "benchmarks.quality", *(word for word in sys.argv[1:] if word != "--report")])


def machine() -> str:
    """Name the processor, the number of cores and of threads, and the GPU if one is used."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").split("\n") if info.is_file() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    cpu = f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, threads: {torch.get_num_threads()}"
    return f"{torch.cuda.get_device_name()} ({cpu})" if torch.cuda.is_available() else cpu
