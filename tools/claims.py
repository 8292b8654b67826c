"""Hold the documentation's figures against the committed JSON: `python -m tools.claims`.

A table under `<!-- table: NAME -->` is made from the results (tools/tables), one under a comment that names results has
methods as rows and sizes as columns:

    <!-- figures: benchmarks/quality/results/tiny/results.json evaluation -->

A figure in a sentence is bound by an entry of claims.yaml. A figure agrees if it is the measured one, rounded to the
digits shown. Any other number with a decimal point or a unit of what is measured (%, ×, bytes, time, tokens) has to be
a setting (`settings` there): what is asked for, a version, a constant of the method, and no measurement.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from tools.tables import MARKER as MADE
from tools.tables import written

ROOT = Path(__file__).parents[1]
# recipes.md has the defaults of settings, which tests/docs/test_reference.py holds against the code.
PAGES = (
    "README.md",
    *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md") if page.name != "recipes.md"),
)
MARKER = re.compile(r"<!-- figures: (\S+) (\S+) -->\n((?:\|.*\n)+)")
NUMBER = re.compile(r"(?<![\w.-])-?\d+\.\d+(?![\w.]*\d)")
WHOLE = r"(?<![\w.,/-])\d+(?= ?(?:%|×|[kMG]i?B\b|k tokens|(?:bytes|milliseconds|seconds|minutes|hours|ms|s)\b))"
FIGURE = re.compile(f"{NUMBER.pattern}|{WHOLE}")
# What is printed, typed or linked to: commands, their output (tools/tour.py), addresses.
CODE = re.compile(r"```.*?```|^ {4}[^\n]*$|`[^`\n]+`|\]\([^)]*\)|arXiv:? ?\d{4}\.\d{4,5}", re.DOTALL | re.MULTILINE)
DOCUMENT: dict[str, Any] = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Claim:
    """One figure of a page: where it stands, as it is `shown`, and what was measured (None: no such row)."""

    where: str
    shown: str
    measured: float | None

    @property
    def agrees(self) -> bool:
        """Tell whether rounding what was measured to the digits shown gives what is shown."""
        if self.measured is None:
            return False
        half = 0.5 * 10.0 ** -len(self.shown.partition(".")[2])
        return abs(float(self.shown) - self.measured) <= half * (1 + 1e-9)


def claims(page: str, text: str) -> Iterator[Claim]:
    """Yield every bound figure of a page outside of the tables that are made."""
    for file, name, table in MARKER.findall(text):
        yield from _table(f"{page}: {file}", _read(file), name, table)
    for said in DOCUMENT["figures"]:
        if said["page"] == page:
            yield from _said(said, text)


def unbound(page: str, text: str) -> list[str]:
    """Return every figure of a page, with its line, that is neither bound nor a setting."""
    text = MADE.sub(_blank, MARKER.sub(_blank, CODE.sub(_blank, text)))
    for said in DOCUMENT["figures"]:
        if said["page"] == page:
            text = _pattern(said["words"]).sub(_blank, text)
    for setting in DOCUMENT["settings"]:
        text = _pattern(setting, lead=r"(?<![\w.-])").sub(_blank, text)
    return [
        f"{page}:{number}: {found}" for number, line in enumerate(text.split("\n"), 1) for found in FIGURE.findall(line)
    ]


def _blank(found: re.Match[str]) -> str:
    """Return as many lines as were found, without a figure."""
    return re.sub(r"\d", "x", found[0])


@cache
def _read(file: str) -> Any:
    path = ROOT / file
    return json.loads((path if path.is_file() else path / "results.json").read_text(encoding="utf-8"))


def _pattern(words: str, lead: str = "") -> re.Pattern[str]:
    """Return words with {} for a figure, … for anything within the line, and any space or line break between them."""
    found = re.escape(words).replace(r"\{\}", r"(-?\d+(?:\.\d+)?)").replace("…", "[^\n]*?")
    return re.compile(f"{lead}{found.replace(chr(92) + ' ', chr(92) + 's+')}(?![\\w.]*\\d)")


def _said(said: Mapping[str, Any], text: str) -> Iterator[Claim]:
    """Yield the figures of a sentence, each with its place in the results; a sentence that is not there has none."""
    found = _pattern(said["words"]).search(text)
    for index, key in enumerate(said["keys"]):
        shown = found[index + 1] if found else "nan"
        yield Claim(f"{said['page']}: {said['words']}, {key}", shown, _measured(said["file"], key))


def _measured(file: str, key: str) -> float:
    """Return a result at a dotted path, or that of a row: "method@keep text field"; "FILE: KEY" is of another file."""
    other, of, rest = key.partition(": ")
    if of:
        return _measured(other, rest)
    results = _read(file)
    if "@" in key:
        row, text, name = key.split(" ")
        method, keep = row.split("@")
        found = next(one for one in results["rows"] if (one["method"], one["keep"]) == (method, float(keep)))
        return float(found["texts"][text][name])
    scale, _, path = key.rpartition("*")  # "1e-6*bytes": in MB
    for part in path.split("."):
        results = results[int(part) if isinstance(results, list) else part]
    return float(results) * float(scale or 1)


def _table(where: str, results: Mapping[str, Any], text: str, table: str) -> Iterator[Claim]:
    """Yield the figures of a table of methods: perplexity ± spread under "keep K", E/E_c in the column after it."""
    rows = {(row["method"], row["keep"]): row["texts"][text] for row in results["rows"]}
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for line in lines:
        method, keep = line[0].partition(":")[0].strip("` "), None
        for title, cell in zip(header[1:], line[1:], strict=True):
            size = re.search(r"keep ([\d.]+)", title) or re.search(r"keep ([\d.]+)", header[0])
            keep = float(size[1]) if size else keep
            found = rows.get((method, keep)) if keep is not None else None
            yield from _cell(f"{where}: {method} at {keep}", title, cell, found)


def _cell(where: str, title: str, cell: str, found: Mapping[str, Any] | None) -> Iterator[Claim]:
    names = ("ratio",) if title == "E/E_c" else ("mean", "spread")
    for index, shown in enumerate(NUMBER.findall(cell)):
        name = names[index] if index < len(names) else "nothing"
        yield Claim(f"{where}, {name}", shown, found.get(name) if found else None)


def main() -> int:
    """Print what does not agree or is not bound; 1 if there is any."""
    wrong: list[str] = []
    bound = 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found = list(claims(page, text))
        made = sum(len(NUMBER.findall(table)) for _, table in MADE.findall(text))
        bound += len(found) + made
        wrong += [f"{one.where}: the page says {one.shown}, measured {one.measured}" for one in found if not one.agrees]
        wrong += [f"{page}: a table is not what the results give: python -m tools.tables"] * (written(text) != text)
        wrong += [f"{figure} is bound to no result and no setting" for figure in unbound(page, text)]
    sys.stdout.write("".join(f"{line}\n" for line in wrong))
    sys.stdout.write(f"{bound} figures are bound, {len(wrong)} are wrong or unbound\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
