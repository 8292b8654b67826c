"""Tables of benchmarks.md: methods on SmolLM2, over the runs of benchmarks/quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import log
from statistics import mean, stdev
from typing import Any

from tools.tables.read import decimals, four, read

SMOLLM2 = "quality/results/smollm2-135m"
TEXTS = ("evaluation", "c4")  # WikiText-2, and C4's validation
CONTROL = "svd-llm"
SIZES = {0.8: ("keep-0.8-0.4", "keep-0.8-seed1"), 0.6: ("keep-0.6",), 0.4: ("keep-0.8-0.4", "keep-0.4-seed1")}
METHODS = (CONTROL, "svd-llm-distilled", "two-sided-distilled", "two-sided-pivoted-distilled")
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Cells:
    """The cells of one method at one size, of several folders, a seed each."""

    folders: tuple[str, ...]
    method: str
    keep: float

    def cells(self, method: str = "") -> list[Mapping[str, Any]]:
        """Return the cells, or those of another method beside them."""
        wanted = (method or self.method, self.keep)
        found = [cell for folder in self.folders for cell in _results(folder)["cells"]]
        return [cell for cell in found if (cell["method"], cell["keep"]) == wanted]

    def perplexity(self, text: str) -> str:
        """Return the mean over seeds, with its spread (standard deviation; of two, half their distance)."""
        values = [cell["perplexity"][text]["value"] for cell in self.cells()]
        if len(set(values)) < 2 or self.method == CONTROL:
            return four(values[0])
        spread = stdev(values) if len(values) > 2 else abs(values[0] - values[1]) / 2
        return f"{four(mean(values))} ± {spread:.{decimals(mean(values))}f}"

    def left(self, text: str) -> str:
        """Return E / E_c: the part of the control's excess loss that is left, mean over seeds."""
        dense = _results(self.folders[0])["dense"][text]["value"]
        excess = [
            mean(log(cell["perplexity"][text]["value"] / dense) for cell in self.cells(method))
            for method in (self.method, CONTROL)
        ]
        return f"{excess[0] / excess[1]:.3f}"

    def task(self, name: str, kind: str = "acc") -> float:
        """Return a task's accuracy, mean over seeds."""
        return mean(cell["tasks"][name][kind] for cell in self.cells())

    def task_means(self, kind: str) -> list[float]:
        """Return the mean over tasks for each seed."""
        return [mean(task[kind] for task in cell["tasks"].values()) for cell in self.cells() if cell["tasks"]]


@cache
def _results(folder: str) -> Any:
    return read(f"{SMOLLM2}/{folder}/results.json")


def sizes() -> Rows:
    """Return perplexity and E / E_c of each method at three sizes."""
    names = ("WikiText-2", "C4")
    dense = _results("keep-0.6")["dense"]
    head = [f"keep {keep:g}, {name}" for keep in SIZES for name in names]
    found: Rows = [("", *head), ("dense", *([four(dense[text]["value"]) for text in TEXTS] * len(SIZES)))]
    for method in METHODS:
        cells = [(Cells(folders, method, keep), text) for keep, folders in SIZES.items() for text in TEXTS]
        found.append((method, *(f"{one.perplexity(text)} ({one.left(text)})" for one, text in cells)))
    return found


def tasks() -> Rows:
    """Return accuracies at keep 0.6, their mean (and each seed's), and the agreement with the dense model."""
    dense = _results("keep-0.6")["dense_tasks"]
    head = (
        "keep 0.6",
        *(f"{name.partition('.')[0]} acc" for name in dense),
        "mean (each seed)",
        "same answer as dense",
    )
    alone = [task["acc"] for task in dense.values()]
    found: Rows = [head, ("dense", *(f"{value:.3f}" for value in alone), f"{mean(alone):.3f}", "1")]
    for method in METHODS:
        one = Cells(("keep-0.6",), method, 0.6)
        means = one.task_means("acc")
        each = f" ({', '.join(f'{value:.3f}' for value in means)})" if len(means) > 1 else ""
        same = mean(one.task_means("agreement"))
        found.append((method, *(f"{one.task(name):.3f}" for name in dense), f"{mean(means):.3f}{each}", f"{same:.3f}"))
    return found


def _line(label: Sequence[str], folder: str, method: str, keep: float) -> tuple[str, ...]:
    """Return a row: tokens, perplexity on both texts with E / E_c, and the mean of the tasks by acc_norm."""
    one = Cells((folder,), method, keep)
    tokens = one.cells()[0]["training_tokens"]
    means = one.task_means("acc_norm")
    texts = (f"{one.perplexity(text)} ({one.left(text)})" for text in TEXTS)
    return (*label, f"{tokens / 1000:.0f}k", *texts, f"{mean(means):.3f}" if means else "")


def _optimisers() -> Iterator[tuple[str, ...]]:
    yield "keep", "optimiser", "tokens", "WikiText-2", "C4", "task mean (acc_norm)"
    ours, control = "two-sided-distilled", "svd-llm-distilled"
    yield _line(("0.8", "AdamW"), "keep-0.8-0.4", ours, 0.8)
    yield _line(("0.8", "Muon"), "muon-0.8-effort-2", ours, 0.8)
    yield _line(("0.6", "AdamW"), "keep-0.6", ours, 0.6)
    yield _line(("0.6", "Muon"), "muon-0.6", ours, 0.6)
    yield _line(("0.6", "Muon"), "muon-0.6-effort-4", ours, 0.6)
    yield _line(("0.6, SVD-LLM", "AdamW"), "keep-0.6", control, 0.6)
    yield _line(("0.6, SVD-LLM", "Muon"), "muon-0.6-control", control, 0.6)
    yield _line(("0.4", "AdamW"), "keep-0.8-0.4", ours, 0.4)
    yield _line(("0.4", "Muon"), "muon-0.4-effort-2", ours, 0.4)
    yield _line(("0.4, SVD-LLM", "Muon"), "muon-0.4-effort-2-control", control, 0.4)


def _phases() -> Iterator[tuple[str, ...]]:
    yield "keep 0.6, stacked", "tokens", "WikiText-2", "C4", "task mean (acc_norm)"
    yield _line(("svd-llm-distilled",), "keep-0.6", "svd-llm-distilled", 0.6)
    yield _line(("soco-scores: whitened, scores alone",), "soco-0.6", "soco-scores", 0.6)
    yield _line(("soco: whitened, then distilled",), "soco-0.6", "soco", 0.6)
    yield _line(("soco-plus: two-sided, then distilled",), "soco-0.6", "soco-plus", 0.6)
    together = "soco-together: two-sided, components learn beside their scores, then distilled"
    yield _line((together,), "soco-together-0.6", "soco-together", 0.6)
    yield _line(
        ("two-sided-distilled: closed form, all tokens for distillation",), "keep-0.6", "two-sided-distilled", 0.6
    )


def calibration() -> Rows:
    """Return what the calibration text is worth, nothing trained."""
    names = {"calibration-wikitext": "WikiText's training text", "calibration-c4": "C4 documents",
             "calibration-both": "both, in turns"}  # fmt: skip
    methods = (CONTROL, "two-sided")
    head = [f"{method}, {text}" for method in methods for text in ("WikiText-2", "C4")]
    found: Rows = [("calibrated on 64 blocks of", *head)]
    for folder, name in names.items():
        cells = [Cells((folder,), method, 0.6).perplexity(text) for method in methods for text in TEXTS]
        found.append((name, *cells))
    return found


TABLES: dict[str, Callable[[], Rows]] = {
    "smollm2-sizes": sizes,
    "smollm2-tasks": tasks,
    "smollm2-optimisers": lambda: list(_optimisers()),
    "smollm2-phases": lambda: list(_phases()),
    "smollm2-calibration": calibration,
}
