"""Bytes as the budget: what the tool chooses for a size, beside dense models of that size.

    python -m benchmarks.bits.budget dense=soco_train/builtin/tiny --out benchmarks/bits/results/tiny-budget
    python -m benchmarks.bits.budget dense=FOLDER --calibrate train.raw --evaluate test.raw --block 2048 --blocks 4 \
        --sizes 70 90 110 --work WORK --out OUT

The dense rows are `--grids`, rounded by each of `--rules`. The sizes are theirs, or `--sizes` in MB; for each and by
each rule the plan chooses form, rank, type and block of every layer and of the token table, among candidates by their
KL on blocks held out of the calibration text. `trained` rows are distilled as they are rounded (models.py), dense
ones in their grid, chosen ones each layer as its plan has it; nothing else is trained. OUT/budget.json has every row as
soon as it is measured, rows of the same inputs are kept; OUT/budget.md is the table. WORK keeps spectra, damage, what
layers read and how each was rounded: a further size then asks for little.

With `--in-torch` no file is written: the model in PyTorch gets the numbers that the export would leave, and its bytes
are counted. Such rows cannot be `trained`.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.bits.models import LEARNING_RATES, TRAINED, learning, least_divergence, tokenizer_of
from benchmarks.bits.models import Subject as Trainable
from benchmarks.bits.run import blocks_of, key_of, make_parser, rounding, setting_of, settings
from soco_export.checkpoint.layers import apply_factors, record_types
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.files.atomic import write_atomic
from soco_export.model.file_bytes import BLOCK_SIZES, FileBytes
from soco_export.onnx.build import count_bytes
from soco_export.onnx.rounded import round_as_exported
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import BlankWeights
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.run.plans.byte_plan import plan_bytes_measured
from soco_export.run.plans.measured_bytes import PlanLoss, hold_out
from soco_train import method
from soco_train.events import Event
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.scores.damage import RoundedInBlocks, measure_damage
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.damage import Damage
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores

GRIDS = ("int8-32", "int4-32", "int4-64", "int4-128", "int2-32")
NEAR = 0.002  # sizes that differ by less are one


@dataclass(frozen=True)
class Row:
    """One model in one form; bytes: of model.onnx and its data; loss: mean cross entropy of a token.

    asked: the budget of a chosen one, `chosen` its name among the candidates, `measured` the KL of each on held-out
    text; choices: how many layers are of each form and type. seconds: of processor time for all but the evaluation.
    """

    model: str
    grid: str
    rule: str
    bytes: int
    loss: float
    perplexity: float
    tokens: int
    seconds: float
    asked: int = 0
    chosen: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    choices: Mapping[str, int] = field(default_factory=dict)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every row that is missing and write them."""
    options = parse(argv)
    folder = options.models[0][1]
    options.out.mkdir(parents=True, exist_ok=True)
    path, setting = options.out / "budget.json", {**setting_of(options), "key": key_of(folder, options)}
    if options.learning_rates != list(LEARNING_RATES):
        setting["learning_rates"] = options.learning_rates
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = [Row(**row) for row in document["rows"]] if document.get("setting") == setting else []

    def keep(name: tuple[str, str, str], asked: int, make: Callable[[], Row]) -> None:
        if not any((row.model, row.grid, row.rule, row.asked) == (*name, asked) for row in rows):
            rows.append(make())
            found = {"setting": setting, "rows": [asdict(row) for row in rows]}
            write_atomic(path, json.dumps(found, indent=1) + "\n")
            write_atomic(options.out / "budget.md", markdown(rows, setting))

    with tempfile.TemporaryDirectory() as temporary:
        planner = Planner(options, options.work or Path(temporary))
        for grid, rule in product(options.grids, options.rules):
            dense = planner.dense if options.in_torch else partial(dense_row, options)
            keep(("dense", grid, rule), 0, partial(dense, grid, rule))
        for size, rule in product(options.sizes or sizes_of(rows), options.rules):
            keep(("chosen", "", rule), size, partial(planner.row, size, rule))
    print(markdown(rows, setting))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    more = make_parser("python -m benchmarks.bits.budget", grids=GRIDS)
    more.add_argument("--sizes", nargs="*", type=lambda text: round(float(text) * 1e6), default=[], help="MB")
    more.add_argument("--work", type=Path, help="keep spectra, scores, damage and levels here")
    more.add_argument("--in-torch", action="store_true", help="round and score in PyTorch, count the bytes")
    more.add_argument("--learning-rates", nargs="+", type=float, default=list(LEARNING_RATES), help="tried for each")
    options = more.parse_args(argv)
    if options.in_torch and TRAINED in options.rules:
        more.error("--in-torch trains nothing")
    return options


def dense_row(options: argparse.Namespace, grid: str, rule: str) -> Row:
    """Train if asked, round, export and score a dense row."""
    folder, started = options.models[0][1], time.process_time()
    how = settings(grid, "nearest" if rule == TRAINED else rule, options.tokens)
    with tempfile.TemporaryDirectory() as work:
        if rule == TRAINED:
            text = blocks_of(folder, options, "calibration")
            subject = Trainable(folder, 1.0, text, options.tokens, Path(work))
            folder = subject.trained(rounding(grid), options.learning_rates).folder
        spent = time.process_time() - started
        row = measure(("dense", grid, rule), folder, options, how)
    return replace(row, seconds=round(row.seconds + spent, 1))


def measure(name: tuple[str, str, str], folder: Path, options: argparse.Namespace, how: ExportSettings) -> Row:
    """Export and score one row."""
    started = time.process_time()
    with tempfile.TemporaryDirectory() as work:
        out, text = Path(work) / "onnx", blocks_of(folder, options, "calibration")
        export_onnx(folder, out, how, calibration=lambda: text)
        seconds = time.process_time() - started
        size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
        found = measure_perplexity(OnnxDecoder(out, CPU, options.threads), blocks_of(folder, options, "evaluation"))
    return Row(*name, size, found.loss, found.value, found.tokens, round(seconds, 1))


def sizes_of(rows: Sequence[Row]) -> list[int]:
    """Return the sizes of the dense rows, largest first; of those that are nearly one the largest."""
    found: list[int] = []
    for size in sorted({row.bytes for row in rows if row.model == "dense"}, reverse=True):
        if not found or size < found[-1] * (1 - NEAR):
            found.append(size)
    return found


class Planner:
    """Chooses for a number of bytes; what it measures of the model lies in `work`."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options, self.work, self.folder = options, work, options.models[0][1]
        self.recipe = load_recipe("base").replace({"model.path": str(self.folder), "model.weights": "pretrained"})
        self.texts = cache(lambda: hold_out(blocks_of(self.folder, options, "calibration")))
        self.damage = cache(self._damage)
        self.subject = cache(self._subject)
        self.loss = cache(self._loss)

    def dense(self, grid: str, rule: str) -> Row:
        """Round a dense row in PyTorch, and score it."""
        started, how = time.process_time(), settings(grid, rule, self.options.tokens)
        file, model = FileBytes(self.recipe), copy.deepcopy(self.subject()[0].model)
        round_as_exported(model, how, self.loss(rule).rounder)
        size = count_bytes(file.architecture, BlankWeights(file.architecture, file.shapes, {}), how)
        return self._scored(("dense", grid, rule), size, model, started)

    def _scored(self, name: tuple[str, str, str], size: int, model: nn.Module, started: float) -> Row:
        seconds = round(time.process_time() - started, 1)
        found = measure_perplexity(TorchDecoder(model), blocks_of(self.folder, self.options, "evaluation"))
        return Row(*name, size, found.loss, found.value, found.tokens, seconds)

    def row(self, size: int, rule: str) -> Row:
        """Plan, cut, export and score one row."""
        started = time.process_time()
        # Training leaves as little of a rounding's error as calibration does, or less.
        recipe = self._recipe("calibrated" if rule == TRAINED else rule).model_copy(update={"keep_bytes": size})
        kind = recipe.export.quantize.rule
        plan = plan_bytes_measured(recipe, self.damage(kind), self.loss(kind), self.texts()[1].numel())
        assert plan.bytes is not None
        row = self._row(plan, rule, started)
        return replace(row, asked=size, chosen=plan.bytes.chosen, measured=plan.bytes.measured, choices=_counted(plan))

    def _row(self, plan: RankPlan, rule: str, started: float) -> Row:
        assert plan.bytes is not None
        if self.options.in_torch:
            return self._scored(("chosen", "", rule), plan.bytes.written, self.loss(rule).model(plan), started)
        with tempfile.TemporaryDirectory() as work:
            where = self._save(plan, Path(work), rule == TRAINED)
            spent = time.process_time() - started
            export = self._recipe("nearest" if rule == TRAINED else rule).export
            row = measure(("chosen", "", rule), where, self.options, export)
        return replace(row, seconds=round(row.seconds + spent, 1))

    def _recipe(self, rule: str) -> Recipe:
        how = {"export.quantize.rule": rule, "export.quantize.calibration_tokens": self.options.tokens}
        return self.recipe.replace({**how, "export.layouts": ["optimum"]})

    def _subject(self) -> tuple[Subject, Scores]:
        tokens = self.texts()[0][: max(1, self.options.tokens // self.options.block)]
        subject = method.open_subject(
            load_checkpoint(self.folder, dtype=torch.float32), LayerSettings(), tokens, self.work
        )
        train = TrainSettings(scorer="singular-values", basis="two-sided")
        method.make_spectra(subject, train)
        return subject, method.learn_scores(subject, train, PlanSettings(), Session(self.work / "scores"))

    def _loss(self, rule: str) -> PlanLoss:
        subject, scores = self.subject()
        return PlanLoss(subject, scores, self._recipe(rule).export, self.texts(), self.work / "candidates" / rule)

    def _damage(self, rule: str) -> Damage:
        path = self.work / f"damage-{rule}.safetensors"
        if not path.exists():
            subject, scores = self.subject()
            measure_damage(subject, scores, subject.tokens, RoundedInBlocks(BLOCK_SIZES, rule=rule)).save(path)
        return Damage.load(path)

    def _save(self, plan: RankPlan, out: Path, train: bool) -> Path:
        """Return the checkpoint of a plan, trained as rounded or nothing refined."""
        model = load_checkpoint(self.folder, dtype=torch.float32)
        apply_factors(model, self._trained(plan, out) if train else self._cut(plan, RefineSettings(), out, []))
        record_types(model, plan.weights, plan.blocks)
        save_checkpoint(model, tokenizer_of(self.folder), out / "hf")
        return out / "hf"

    def _cut(self, plan: RankPlan, refine: RefineSettings, out: Path, events: list[Event]) -> Factors:
        subject, scores = self.subject()
        if refine.distill.steps:  # from all of the text, as what is trained beside it
            subject = replace(subject, tokens=blocks_of(self.folder, self.options, "calibration"))
        return method.cut_factors(subject, scores, plan, refine, Session(out / "work", events.append)).made()

    def _trained(self, plan: RankPlan, out: Path) -> Factors:
        """Return what the learning rate gives whose divergence on held-out blocks is the least."""
        found: list[tuple[float, Factors]] = []
        for lr in self.options.learning_rates:
            events: list[Event] = []
            as_planned = plan.rounding(RoundingSettings(weights="planned"))
            distill = learning(self.options.block, lr=lr, rounding=as_planned)
            factors = self._cut(plan, RefineSettings(distill=distill), out / f"{lr:g}", events)
            found.append((least_divergence(events), factors))
        return min(found, key=lambda one: one[0])[1]


def _counted(plan: RankPlan) -> dict[str, int]:
    kinds = (
        f"{plan.forms.get(name, 'dense')} {weights}-{plan.blocks.get(name, 0)}".removesuffix("-0")
        for name, weights in plan.weights.items()
    )
    return dict(sorted(Counter(kinds).items()))


def markdown(rows: Sequence[Row], setting: Mapping[str, Any]) -> str:
    """Return a table: each size, by rule the best dense row that is no larger beside what was chosen."""
    lines = [
        "| MB asked | rule | best dense | MB | perplexity | chosen | MB | perplexity | chosen / dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in sorted((row for row in rows if row.model == "chosen"), key=lambda row: (-row.asked, row.rule)):
        dense = [
            other for other in rows if (other.model, other.rule) == ("dense", row.rule) and other.bytes <= row.asked
        ]
        best = min(dense, key=lambda other: other.loss, default=None)
        beside = f"{best.grid} | {best.bytes / 1e6:.3f} | {best.perplexity:.5g}" if best else "none | | "
        ratio = f"{row.perplexity / best.perplexity:.4f}" if best else ""
        ours = f"{row.chosen} | {row.bytes / 1e6:.3f} | {row.perplexity:.5g} | {ratio}"
        lines.append(f"| {row.asked / 1e6:.3f} | {row.rule} | {beside} | {ours} |")
    said = f"{rows[0].tokens} tokens of {setting['evaluation']} in windows of {setting['block']}"
    return "\n".join(
        [*lines, "", f"Perplexity over {said}; only `trained` rows are trained. Every row is in budget.json.", ""]
    )


if __name__ == "__main__":
    main()
