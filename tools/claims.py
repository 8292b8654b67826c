"""Hold the documentation's figures against the committed JSON: `python -m tools.claims`.

A table is bound by a comment above it that names the results it was made from; its rows are methods, its columns sizes:

    <!-- figures: benchmarks/quality/results/tiny/results.json evaluation -->

A figure in a sentence, or in a row of another table, is bound by an entry of claims.yaml. A figure agrees if it is the
measured one, rounded to the digits shown. The last line says how many of the pages' figures are bound; the others are
definitions, defaults, or nobody's yet.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/benchmarks.md", "docs/relatives.md")
MARKER = re.compile(r"<!-- figures: (\S+) (\S+) -->\n((?:\|.*\n)+)")
NUMBER = re.compile(r"-?\d+\.\d+")
SAID: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("claims.yaml").read_text(encoding="utf-8"))


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


def claims(page: str, text: str, root: Path = ROOT) -> Iterator[Claim]:
    """Yield every bound figure of a page."""
    for file, name, table in MARKER.findall(text):
        yield from _table(f"{page}: {file}", _read(root, file), name, table)
    for said in SAID:
        if said["page"] == page:
            yield from _said(f"{page}: {said['words']}", said["words"], text, _read(root, said["file"]), said["keys"])


def _read(root: Path, file: str) -> Any:
    path = root / file
    return json.loads((path if path.is_file() else path / "results.json").read_text(encoding="utf-8"))


def _said(where: str, words: str, text: str, results: Any, keys: Sequence[str]) -> Iterator[Claim]:
    """Yield the figures of a sentence, each with its place in the results; a sentence that is not there has none."""
    pattern = re.escape(words).replace(r"\{\}", f"({NUMBER.pattern})").replace("…", "[^\n]*?").replace(r"\ ", r"\s+")
    found = re.search(pattern, text)
    for index, key in enumerate(keys):
        yield Claim(f"{where}, {key}", found[index + 1] if found else "nan", _measured(results, key))


def _measured(results: Any, key: str) -> float:
    """Return the figure at a dotted path, or that of a row: "method@keep text field"."""
    if "@" in key:
        row, text, name = key.split(" ")
        method, keep = row.split("@")
        found = next(one for one in results["rows"] if (one["method"], one["keep"]) == (method, float(keep)))
        return float(found["texts"][text][name])
    for part in key.split("."):
        results = results[part]
    return float(results)


def _table(where: str, results: Mapping[str, Any], text: str, table: str) -> Iterator[Claim]:
    """Yield the figures of a table of methods: perplexity ± spread under "keep K", E/E_c in the column after it."""
    rows = {(row["method"], row["keep"]): row["texts"][text] for row in results["rows"]}
    header, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for line in lines:
        method, keep = line[0].partition(":")[0].strip("` "), None
        for title, cell in zip(header, line, strict=True):
            size = re.search(r"keep ([\d.]+)", title)
            keep = float(size[1]) if size else keep
            found = rows.get((method, keep)) if keep is not None else None
            if found is not None and title != header[0]:
                yield from _cell(f"{where}: {method} at {keep:g}", title, cell, found)


def _cell(where: str, title: str, cell: str, found: Mapping[str, Any]) -> Iterator[Claim]:
    names = ("ratio",) if title == "E/E_c" else ("mean", "spread")
    for shown, name in zip(NUMBER.findall(cell), names, strict=False):
        yield Claim(f"{where}, {name}", shown, found[name])


def main() -> int:
    """Print what does not agree, and how much is bound; 1 if a figure does not agree."""
    wrong, bound, all_figures = [], 0, 0
    for page in PAGES:
        text = (ROOT / page).read_text(encoding="utf-8")
        found = list(claims(page, text))
        wrong += [claim for claim in found if not claim.agrees]
        bound += len(found)
        shown = re.sub(r"```.*?```", "", text, flags=re.DOTALL)  # what is printed there comes from tour.py
        all_figures += len(NUMBER.findall(shown))
    for claim in wrong:
        sys.stdout.write(f"{claim.where}: the page says {claim.shown}, measured {claim.measured}\n")
    sys.stdout.write(f"{bound} figures of {all_figures} are bound, {len(wrong)} of them do not agree\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
