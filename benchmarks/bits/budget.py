"""Bytes as the budget: what the tool chooses for a size, beside dense models of that size and near it.

    python -m benchmarks.bits.budget soco_train/builtin/tiny --out benchmarks/bits/results/tiny-budget

The dense rows are every grid of run.py, rounded by each rule. The sizes are theirs and the geometric means of
neighbours; for each the plan chooses form, rank and type of every layer and of the token table, and is rounded by each
rule. Nothing is trained. OUT/budget.json holds all rows, OUT/budget.md the table.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from math import sqrt
from pathlib import Path

from benchmarks.bits.run import _blocks, parse, settings
from soco_export.checkpoint.layers import apply_factors, record_weights
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.session import OnnxDecoder
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.files.atomic import write_atomic
from soco_export.recipe.load import load_recipe
from soco_export.run.byte_plan import plan_bytes
from soco_train import method
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import RankPlan
from soco_train.scores.damage import RoundedInBlocks, measure_damage
from soco_train.settings import LayerSettings, PlanSettings, RefineSettings, TrainSettings
from soco_train.store.damage import Damage
from soco_train.store.scores import Scores

RULES = ("nearest", "calibrated")
GRIDS = ("int8-32", "int4-32", "int4-64", "int2-32")


@dataclass(frozen=True)
class Row:
    """One model in one form; bytes: of model.onnx and its data; loss: mean cross entropy of a token."""

    model: str
    grid: str
    rule: str
    bytes: int
    loss: float
    perplexity: float
    tokens: int


def measure(name: tuple[str, str, str], folder: Path, options: argparse.Namespace) -> Row:
    """Export and score one row."""
    _, grid, rule = name
    with tempfile.TemporaryDirectory() as work:
        out, text = Path(work) / "onnx", _blocks(folder, options, "calibration")
        export_onnx(folder, out, settings(grid, rule, options.tokens), calibration=lambda: text)
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        found = measure_perplexity(OnnxDecoder(out, CPU, options.threads), _blocks(folder, options, "evaluation"))
    return Row(*name, bytes=size, loss=found.loss, perplexity=found.value, tokens=found.tokens)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row and write them."""
    own = argparse.ArgumentParser(prog="python -m benchmarks.bits.budget")
    own.add_argument("folder", type=Path)
    own.add_argument("--out", type=Path, required=True)
    own.add_argument("--threads", type=int, default=2)
    asked = own.parse_args(argv)
    options = parse([f"dense={asked.folder}", "--out", str(asked.out), "--threads", str(asked.threads)])
    dense = [measure(("dense", grid, rule), asked.folder, options) for grid in GRIDS for rule in RULES]
    with tempfile.TemporaryDirectory() as work:
        chosen = list(_chosen(asked.folder, sizes_of(dense), options, Path(work)))
    asked.out.mkdir(parents=True, exist_ok=True)
    document = {
        "dense": [asdict(row) for row in dense],
        "chosen": [{"asked": size, "choices": choices, **asdict(row)} for size, choices, row in chosen],
    }
    write_atomic(asked.out / "budget.json", json.dumps(document, indent=1) + "\n")
    text = markdown(dense, [(size, row) for size, _, row in chosen])
    write_atomic(asked.out / "budget.md", text)
    print(text)


def sizes_of(dense: Sequence[Row]) -> list[int]:
    """Return the sizes of the dense rows and the geometric means of neighbours, largest first."""
    known = sorted({row.bytes for row in dense}, reverse=True)
    return sorted({*known, *(int(sqrt(one * two)) for one, two in pairwise(known))}, reverse=True)


def _chosen(
    folder: Path, sizes: Sequence[int], options: argparse.Namespace, work: Path
) -> Iterator[tuple[int, dict[str, int], Row]]:
    """Yield (bytes asked for, how many layers are of each form and type, row)."""
    recipe = load_recipe("base").replace({"model.path": str(folder), "model.weights": "pretrained"})
    subject, scores, damage = _measured(folder, options, work)
    for size in sizes:
        plan = plan_bytes(recipe.model_copy(update={"keep_bytes": size}), damage)
        where = _folder(folder, subject, scores, plan, work / f"{size}")
        for rule in RULES:
            yield size, _counted(plan), measure((f"{size}", "int8-32", rule), where, options)


def _measured(folder: Path, options: argparse.Namespace, work: Path) -> tuple[Subject, Scores, Damage]:
    tokens = _blocks(folder, options, "calibration")[: max(1, options.tokens // options.block)]
    subject = method.open_subject(load_checkpoint(folder), LayerSettings(), tokens, work / "spectra")
    train = TrainSettings(scorer="singular-values", basis="two-sided")
    method.make_spectra(subject, train)
    scores = method.learn_scores(subject, train, PlanSettings(), Session(work / "scores"))
    return subject, scores, measure_damage(subject, scores, tokens, RoundedInBlocks())


def _folder(folder: Path, subject: Subject, scores: Scores, plan: RankPlan, out: Path) -> Path:
    """Return the checkpoint of a plan, nothing refined."""
    from transformers import AutoTokenizer

    model = load_checkpoint(folder)
    factors = method.cut_factors(subject, scores, plan, RefineSettings(), Session(out / "work"))
    apply_factors(model, factors.made())
    record_weights(model, plan.weights)
    save_checkpoint(model, AutoTokenizer.from_pretrained(folder), out / "hf")
    return out / "hf"


def _counted(plan: RankPlan) -> dict[str, int]:
    kinds = (f"{plan.forms.get(name, 'dense')} {weights}" for name, weights in plan.weights.items())
    return dict(sorted(Counter(kinds).items()))


def markdown(dense: Sequence[Row], chosen: Sequence[tuple[int, Row]]) -> str:
    """Return a table: each size, the best dense row that is no larger, and what was chosen, by rule of rounding."""
    lines = [
        "| MB asked | MB chosen | nearest | calibrated | best dense no larger | MB | its perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for size in sorted({size for size, _ in chosen}, reverse=True):
        rows = {row.rule: row for asked, row in chosen if asked == size}
        found = " | ".join(f"{rows[rule].perplexity:.5g}" for rule in RULES)
        best = min((row for row in dense if row.bytes <= size), key=lambda row: row.loss, default=None)
        beside = "none | | " if best is None else f"{best.grid} {best.rule} | {best.bytes / 1e6:.3f} | "
        beside += "" if best is None else f"{best.perplexity:.5g}"
        lines.append(f"| {size / 1e6:.3f} | {rows['nearest'].bytes / 1e6:.3f} | {found} | {beside} |")
    return "\n".join([*lines, "", "Perplexity; nothing is trained. Every row is in budget.json.", ""])


if __name__ == "__main__":
    main()
