"""Cells → one row per method and size: mean and spread over seeds, and E = ln(perplexity / dense) against the control.

E / E_c says which part of the control's loss is left: 1 is the control, 0 the dense model. E_c is the excess of
SVD-LLM's uniform cut, stacked and untrained, at the same size. Nothing is rounded before it is printed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

from benchmarks.quality.cells import CONTROL, CellResult, Perplexity
from soco_export.evaluate.figures import TaskFigures


@dataclass(frozen=True)
class Figures:
    """On one text, over seeds. `spread`: sample standard deviation, None for one seed; `ratio`: mean E / E_c."""

    values: tuple[float, ...]
    mean: float
    spread: float | None
    excess: float
    ratio: float | None


@dataclass(frozen=True)
class Row:
    """One method at one size. `stored`: parameters of the participating layers, mean over seeds, of `of`."""

    method: str
    description: str
    keep: float
    storage: str
    stored: float
    of: int
    training_tokens: int
    seeds: tuple[int, ...]
    texts: Mapping[str, Figures]


def rows(cells: Sequence[CellResult], dense: Mapping[str, Perplexity]) -> list[Row]:
    """Group cells by method and size, in their order; the control must be among them for E / E_c to be known."""
    groups: dict[tuple[str, float], list[CellResult]] = {}
    for cell in cells:
        groups.setdefault((cell.method, cell.keep), []).append(cell)
    control = {
        (keep, text): _excess(group, text, dense)
        for (method, keep), group in groups.items()
        if method == CONTROL
        for text in dense
    }
    return [
        Row(
            method=method,
            description=group[0].description,
            keep=keep,
            storage=group[0].storage,
            stored=mean(cell.stored for cell in group),
            of=group[0].of,
            training_tokens=group[0].training_tokens,
            seeds=tuple(cell.seed for cell in group),
            texts={text: _figures(group, text, dense, control.get((keep, text))) for text in dense},
        )
        for (method, keep), group in groups.items()
    ]


def _excess(group: Sequence[CellResult], text: str, dense: Mapping[str, Perplexity]) -> float:
    return mean(math.log(cell.perplexity[text].value / dense[text].value) for cell in group)


def _figures(group: Sequence[CellResult], text: str, dense: Mapping[str, Perplexity], control: float | None) -> Figures:
    values = tuple(cell.perplexity[text].value for cell in group)
    excess = _excess(group, text, dense)
    spread = stdev(values) if len(values) > 1 else None
    return Figures(values, mean(values), spread, excess, excess / control if control else None)


def markdown(table: Sequence[Row], dense: Mapping[str, Perplexity]) -> str:
    """Return one table per text: methods down, sizes across."""
    return "\n".join(part for text in dense for part in _text_table(table, text, dense[text]))


def _text_table(table: Sequence[Row], text: str, dense: Perplexity) -> Iterator[str]:
    keeps = sorted({row.keep for row in table}, reverse=True)
    found = {(row.method, row.keep): row for row in table}
    yield f"### {text}: dense {dense.value:.4g}\n"
    yield f"| method | tokens | {' | '.join(f'keep {keep:g} | E/E_c' for keep in keeps)} |"
    yield f"|---|---|{'---|---|' * len(keeps)}"
    for method in dict.fromkeys(row.method for row in table):
        own = [found.get((method, keep)) for keep in keeps]
        tokens = next(row.training_tokens for row in own if row)
        cells = " | ".join(" | ".join(_shown(row, text)) for row in own)
        yield f"| {method} | {f'{tokens / 1000:.0f}k' if tokens else '0'} | {cells} |"
    yield ""


def _shown(row: Row | None, text: str) -> tuple[str, str]:
    if row is None:
        return "", ""
    figures = row.texts[text]
    spread = "" if figures.spread is None else f" ± {figures.spread:.2g} ({len(figures.values)})"
    return f"{figures.mean:.4g}{spread}", "" if figures.ratio is None else f"{figures.ratio:.3f}"


def task_table(cells: Sequence[CellResult], dense: Mapping[str, TaskFigures]) -> list[str]:
    """Return the table of tasks, a line per method and size: accuracies, their mean, and the agreement with dense.

    A task's accuracy is per byte (acc_norm); means are over seeds.
    """
    groups: dict[tuple[str, float], list[CellResult]] = {}
    for cell in cells:
        if cell.tasks:
            groups.setdefault((cell.method, cell.keep), []).append(cell)
    if not groups:
        return []
    names = list(dense)
    lines = [
        f"### tasks: acc_norm of {', '.join(f'{name} ({figures.items})' for name, figures in dense.items())}\n",
        f"| method | keep | {' | '.join(names)} | mean | same answer as dense |",
        f"|---|---|{'---|' * len(names)}---|---|",
        _task_row("dense", 1.0, [figures.acc_norm for figures in dense.values()], 1.0),
    ]
    for (method, keep), group in sorted(groups.items(), key=lambda entry: -entry[0][1]):
        accuracies = [mean(cell.tasks[name].acc_norm for cell in group) for name in names]
        agreement = mean(cell.tasks[name].agreement for cell in group for name in names)
        lines.append(_task_row(method, keep, accuracies, agreement))
    return [*lines, ""]


def _task_row(method: str, keep: float, accuracies: Sequence[float], agreement: float) -> str:
    shown = " | ".join(f"{accuracy:.3f}" for accuracy in accuracies)
    return f"| {method} | {keep:g} | {shown} | {mean(accuracies):.3f} | {agreement:.3f} |"
