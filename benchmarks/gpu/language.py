"""b: what many more tokens give on a real model. Scores, distillation with Muon, int4-aware, beside the closed forms.

The cells are those of benchmarks.quality, by its laboratory, with the choices of choices.py. Every model is scored as
it is and, under NAME int4, with the weights of its layers as an int4 export rounds them (embedding and head as they
are). On a GPU fp32 products are taken in TF32.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.calibration import Calibration, sampled, split
from benchmarks.gpu.choices import (
    LARGE,
    PROBE,
    PROBED,
    SMALL,
    USUAL,
    Choice,
    Effort,
    closed_forms,
    further,
    trained,
)
from benchmarks.gpu.dense import train_dense
from benchmarks.gpu.document import Figures
from benchmarks.gpu.laboratory import DeviceLaboratory
from benchmarks.gpu.options import CUDA, Options
from benchmarks.quality.cells import Cell, Grid, Perplexity, method_file
from benchmarks.quality.run import named_text
from soco_export.recipe.load import load_recipe
from soco_train.data.corpus import Blocks, fingerprint
from soco_train.scores.registry import find_scorer
from soco_train.settings.data import DataSettings

HELD_OUT = "held out"
NEVER = 10**6  # steps between two checkpoints: a cell takes a minute


def parts(options: Options) -> Sequence[str]:
    """Return the one process: what cells share is in its memory."""
    return ["language"]


def pieces(options: Options, part: str, box: TimeBox) -> Iterator[tuple[str, Any]]:
    """Yield the sampled text, the dense model, and the cells."""
    torch.set_float32_matmul_precision("high" if CUDA else "highest")
    bench = Bench(options, SMALL if options.small else LARGE, box)
    yield "sampled text", bench.sample
    yield "dense", lambda: shown(bench.laboratory.dense())
    keeps = list(bench.effort.rates)
    for keep in keeps:
        for choice in closed_forms(keep):
            yield choice.title, partial(bench.cell, choice)
        yield probe(keep), partial(bench.probe, keep)
        for choice in trained(keep):
            yield choice.title, partial(bench.cell, choice)
        if keep == keeps[0]:
            yield "dense, the same tokens", bench.dense
    for choice in further(keeps[0]):
        yield choice.title, partial(bench.cell, choice)


def probe(keep: float) -> str:
    """Return how the piece is called that chooses a learning rate."""
    return f"{keep:g} learning rate"


class Bench:
    """The laboratory with its texts."""

    def __init__(self, options: Options, effort: Effort, box: TimeBox) -> None:
        self.options, self.effort, self.box = options, effort, box
        path = [] if options.model_path is None else [f"model.path={options.model_path}"]
        self.overrides = (*effort.settings, *options.set, *path, f"data.block={effort.block}")
        recipe = load_recipe(options.model, self.overrides)
        if options.calibrate:
            data = DataSettings(path=options.calibrate, block=effort.block, blocks=recipe.data.blocks)
            recipe = recipe.model_copy(update={"data": data})
        texts = dict(named_text(given) for given in options.evaluate)
        self.laboratory = DeviceLaboratory.open(recipe, texts, options.work / recipe.name, notify=box)
        carried, held_out = split(self.laboratory.calibration.tokens, effort.held_out)
        self.carried = carried
        self.laboratory.texts = {
            **self.laboratory.texts,
            HELD_OUT: Blocks(held_out, HELD_OUT, fingerprint(held_out)),
        }
        self._calibration: Calibration | None = None

    @property
    def calibration(self) -> Calibration:
        """The texts, sampled first where they are not there yet."""
        if self._calibration is None:
            laboratory = self.laboratory
            own = sampled(laboratory.model, self.carried, self.effort, laboratory.work / "sampled", self.box)
            self._calibration = Calibration(self.carried, own, laboratory.texts[HELD_OUT].tokens)
        return self._calibration

    def sample(self) -> Figures:
        """Sample the text."""
        found = self.calibration
        return {"tokens": found.sampled.numel(), "carried": found.carried.numel(), "held_out": found.held_out.numel()}

    def cell(self, choice: Choice, rate: float | None = None) -> Figures:
        """Measure one cell, at the chosen learning rate unless one is given."""
        laboratory, rate = self.laboratory, rate or self.rate(choice.keep)
        laboratory.calibration = self.calibration.blocks(choice.text)
        cell = self.recipe(choice, rate)
        result = laboratory.measure(cell)
        return {
            **shown(result.perplexity),
            "method": choice.method,
            "keep": choice.keep,
            "kept": result.stored / result.of,
            "training_tokens": result.training_tokens,
            "text": choice.text,
            "rate": rate if cell.recipe.refine.distill.steps else None,
            "parts": dict(result.seconds),
        }

    def recipe(self, choice: Choice, rate: float) -> Cell:
        """Return a choice as a cell: its tokens are divided evenly between scores and distillation."""
        method = load_recipe(self.options.model, self.overrides, overlay=method_file(choice.method))
        trains = [find_scorer(method.train.scorer).trains, method.refine.distill.steps > 0]
        steps = max(1, round(choice.effort * self.options.tokens / self.effort.batch / max(1, sum(trains))))
        overrides = [
            *self.overrides,
            *choice.settings,
            f"train.batch_tokens={self.effort.batch}",
            f"refine.distill.batch_tokens={self.effort.batch}",
            f"train.checkpoint_every={NEVER}",
            f"refine.distill.checkpoint_every={NEVER}",
            f"train.lr={self.effort.score_rate}",
            "refine.distill.optimiser=muon",
            f"refine.distill.lr={rate}",
        ]
        overrides += [f"train.steps={steps}"] if trains[0] else []
        overrides += [f"refine.distill.steps={steps}"] if trains[1] else []
        return Grid(self.options.model, [], [], [], overrides=overrides).cell(choice.method, choice.keep, 0)

    def probe(self, keep: float) -> Figures:
        """Try the learning rates of a size with fewer tokens; the one with the lowest loss on held-out text wins."""
        found = {
            rate: self.cell(Choice(PROBED, keep, effort=PROBE), rate)["perplexity"][HELD_OUT]
            for rate in self.effort.rates[keep]
        }
        return {
            "best": min(found, key=found.__getitem__),
            "held_out": {f"{rate:g}": ppl for rate, ppl in found.items()},
        }

    def rate(self, keep: float) -> float:
        """Return the learning rate that the probe chose, from the section's file; else the usual one."""
        return float(_pieces(self.options.out).get(probe(keep), {}).get("best", USUAL))

    def dense(self) -> Figures:
        """Train the dense layers on the same tokens, at each rate; the best on held-out text is what is compared."""
        steps = max(1, round(self.options.tokens / self.effort.batch))
        tokens = self.calibration.blocks("mixed").tokens
        recipe = load_recipe(self.options.model, self.overrides)
        settings = recipe.refine.distill.model_copy(update={"steps": steps, "batch_tokens": self.effort.batch})
        found = {}
        for rate in self.effort.dense_rates:
            with train_dense(self.laboratory.model, recipe.layers, tokens, settings, rate, self.box):
                found[rate] = shown(self.laboratory.perplexities())
        best = min(found, key=lambda rate: found[rate]["perplexity"][HELD_OUT])
        others = {f"{rate:g}": figures["perplexity"][HELD_OUT] for rate, figures in found.items()}
        return {**found[best], "rate": best, "held_out": others, "training_tokens": steps * self.effort.batch}


def _pieces(out: Path) -> dict[str, Any]:
    """Return what the section's file has so far; whoever asks has written it."""
    path = out / "b.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["pieces"] if path.exists() else {}
    return found


def shown(found: dict[str, Perplexity] | Any) -> dict[str, Any]:
    """Return perplexities by text."""
    return {"perplexity": {text: figures.value for text, figures in found.items()}}


def row(figures: Figures) -> str:
    """Say a piece in a few words."""
    if "best" in figures:
        return f"{figures['best']:g} of {', '.join(f'{rate} ({ppl:.4g})' for rate, ppl in figures['held_out'].items())}"
    if "perplexity" not in figures:
        return f"{figures['tokens'] / 1e6:.3g} M tokens beside {figures['carried'] / 1e6:.3g} M carried"
    own = " · ".join(f"{text} {ppl:.4g}" for text, ppl in figures["perplexity"].items())
    tokens = figures.get("training_tokens", 0)
    return own + (f" · {tokens / 1e6:.3g} M tokens at {figures['rate']:g}" if tokens and figures.get("rate") else "")
