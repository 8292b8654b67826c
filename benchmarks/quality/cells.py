"""What a cell is: one method at one size with one seed. The grid of cells, and what each of them measured.

A cell is known by a hash over everything that its figures depend on: settings, weights, texts. results.json is written
in one move when a cell is whole, so that a killed cell leaves nothing and a finished one is never done twice.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.manifest import stage_key
from soco_train.scores.registry import find_scorer
from soco_train.spectra.bases import find_basis
from soco_train.spectra.statistics import OUTPUT_SIDE

CONTROL = "svd-llm"  # every excess is measured against its, at the same size
DENSE = "dense"
KEY = 8  # digits of a hash
TRAINED_KEYS = ("train.steps", "refine.distill.steps")
# All that decides what a cell's model is; what is exported, timed or gated does not.
SETTINGS = ("model", "data", "layers", "train", "refine", "keep_params", "storage", "allocation", "multiple")


@dataclass(frozen=True)
class Cell:
    """One method at one size with one seed, as the recipe that says all of it."""

    method: str
    keep: float
    seed: int
    recipe: Recipe = field(compare=False)  # said by the others

    @property
    def title(self) -> str:
        """How progress calls it."""
        return f"{self.method}-{self.keep:g}-seed{self.seed}"

    def key(self, inputs: Mapping[str, str], whole: bool = False) -> str:
        """Hash what of the cell's settings is not the default, and `inputs`, the hashes by name of weights and texts.

        A setting that is new since a cell was made, and left at its default, leaves the cell valid. `whole`: hash all
        settings, as cells once had it.
        """
        values = self.recipe.model_dump(mode="json", include=set(SETTINGS), exclude_defaults=not whole)
        return stage_key(values, inputs)[:KEY]

    def stem(self, inputs: Mapping[str, str]) -> str:
        """Return what the folder of the cell's model is called."""
        return f"{self.title}.{self.key(inputs)}"


@dataclass(frozen=True)
class Perplexity:
    """On one text: exp of the mean loss in nats over `tokens` scored tokens."""

    value: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class Task:
    """On one task of `items`: accuracy, accuracy per byte, and how often the answer is the dense model's."""

    items: int
    acc: float
    acc_norm: float
    agreement: float


@dataclass(frozen=True)
class CellResult:
    """What one cell measured.

    `stored` and `of`: parameters of the participating layers, pruned and dense; `model_parameters`: of the whole pruned
    model. `training_tokens`: those that scores and distillation saw together; `saliency_tokens`: those that went
    backward once for a closed-form score or the curvature of a basis. `seconds` by part, in the process that made the
    cell: what lay in `work` already took none. `code`: hash over the training code that made it.
    """

    method: str
    description: str
    keep: float
    seed: int
    key: str
    storage: str
    stored: int
    of: int
    model_parameters: int
    training_tokens: int
    saliency_tokens: int
    perplexity: Mapping[str, Perplexity]
    seconds: Mapping[str, float]
    code: str
    tasks: Mapping[str, Task] = field(default_factory=dict)

    @staticmethod
    def read(found: Mapping[str, Any]) -> CellResult:
        """Read a cell as results.json has it."""
        texts = {name: Perplexity(**figures) for name, figures in found["perplexity"].items()}
        tasks = {name: Task(**figures) for name, figures in found["tasks"].items()}
        return CellResult(**{**found, "perplexity": texts, "tasks": tasks})


def read_cells(results: Path) -> dict[str, CellResult]:
    """Return by key all cells of a results.json, those of earlier commands too; none if it is not there."""
    document = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {"cells": []}
    cells = [CellResult.read(found) for found in (*document["cells"], *document.get("earlier", []))]
    return {cell.key: cell for cell in cells}


@dataclass(frozen=True)
class Grid:
    """What was asked for. `effort` multiplies the steps of every method; `overrides` (key=value) go over all cells."""

    model: str
    methods: Sequence[str]
    keeps: Sequence[float]
    seeds: Sequence[int]
    effort: float = 1.0
    overrides: Sequence[str] = ()

    def cells(self) -> list[Cell]:
        """Return the cells, a whole seed before the next: stopped early, the table has fewer seeds and no holes.

        The control is always among them. A method that has nothing random in it gets the first seed alone.
        """
        methods = list(dict.fromkeys([CONTROL, *self.methods]))
        return [
            cell
            for seed in self.seeds
            for keep in self.keeps
            for cell in (self.cell(method, keep, seed) for method in methods)
            if seed == self.seeds[0] or is_random(cell.recipe)
        ]

    def cell(self, method: str, keep: float, seed: int) -> Cell:
        """Return one cell: the method laid over the model; RecipeError if either is unknown."""
        own = (*self.overrides, f"keep_params={keep}", f"train.seed={seed}")
        recipe = load_recipe(self.model, own, overlay=method_file(method))
        steps = {key: max(1, round(value * self.effort)) for key, value in _steps(recipe) if value}
        return Cell(method, keep, seed, recipe.replace(steps, where="--effort"))


def method_file(method: str) -> Path:
    """Return what `load_recipe` takes as overlay: a shipped method by name, or a file."""
    return Path(method) if method.endswith(".yaml") else Path("methods") / method


def is_random(recipe: Recipe) -> bool:
    """Tell whether the seed changes anything: a spectrum cut as it is, is the same every time."""
    return recipe.train.scorer != "singular-values" or recipe.refine.distill.steps > 0


def training_tokens(recipe: Recipe) -> int:
    """Return how many tokens the scores and the distillation see together."""
    train, distill, block = recipe.train, recipe.refine.distill, recipe.data.block
    scored = train.steps * _batch(train.batch_tokens, block) if find_scorer(train.scorer).trains else 0
    return scored + distill.steps * _batch(distill.batch_tokens, block)


def saliency_tokens(recipe: Recipe, blocks: int) -> int:
    """Return how many tokens of `blocks` calibration blocks went backward for a closed-form score, start or basis."""
    train = recipe.train
    found = 0
    if find_basis(train.basis).needs & OUTPUT_SIDE:
        found += min(blocks, train.statistics_blocks or blocks) * recipe.data.block
    if train.scorer == "fisher" or (train.scorer == "soco" and train.start == "fisher"):
        found += min(blocks, train.fisher_blocks) * recipe.data.block
    if recipe.refine.refit.weights == "fisher":
        found += min(blocks, recipe.refine.refit.blocks) * recipe.data.block
    return found


def _batch(tokens: int, block: int) -> int:
    return max(1, tokens // block) * block


def _steps(recipe: Recipe) -> Iterator[tuple[str, int]]:
    yield from zip(TRAINED_KEYS, (recipe.train.steps, recipe.refine.distill.steps), strict=True)
