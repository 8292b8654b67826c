"""Ways to spend a training on one model, side by side: what the benchmarks that compare them share."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from soco_export.checkpoint.layers import apply_factors
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.model.load import load_model, load_tokenizer
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.runtimes.open import torch_decoder
from soco_train import method
from soco_train.data.corpus import load_blocks
from soco_train.modules.subject import Subject
from soco_train.store.factors import Factors

FIGURES = {"mean": "perplexity", "ratio": "ratio"}
_OF_A_SEED = {"way", "size", "seed", *FIGURES.values()}
Row = Mapping[str, Any]


def options(description: str | None, steps: int) -> argparse.ArgumentParser:
    """Return the command line of a benchmark of ways, which may add to it; `steps`: how many are taken by default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a recipe")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=1024, help="tokens of a step")
    parser.add_argument("--ways", nargs="+", help="some of them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--work", type=Path, help="keep spectra and checkpoints here: the same command goes on")
    parser.add_argument("--out", type=Path, required=True)
    return parser


def write(
    given: argparse.Namespace, settings: Sequence[str], measure: Callable[[Recipe, Path], Sequence[Row]], **said: Any
) -> None:
    """Measure every seed and write `given.out`: the command, what is `said`, and a row for each way and size."""
    rows: list[Row] = []
    for seed in given.seeds:
        recipe = load_recipe(given.model, [*settings, f"train.seed={seed}", *given.settings])
        with tempfile.TemporaryDirectory() as folder:
            work = given.work / str(seed) if given.work else Path(folder)
            rows += [{"seed": seed, **row} for row in measure(recipe, work)]
    module = Path(sys.argv[0]).resolve().relative_to(Path(__file__).parents[1]).with_suffix("")
    command = f"python -m {'.'.join(module.parts)} {shlex.join(sys.argv[1:])}"
    document = {"command": command, **said, "rows": list(_by_way(rows))}
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _by_way(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way and size: the mean over seeds, its ratio to the dense model, what no seed changes."""
    for way, size in dict.fromkeys((row["way"], row["size"]) for row in rows):
        own = [row for row in rows if (row["way"], row["size"]) == (way, size)]
        means = {name: sum(row[key] for row in own) / len(own) for name, key in FIGURES.items()}
        seeds = {str(row["seed"]): row["perplexity"] for row in own}
        more = {key: value for key, value in own[0].items() if key not in _OF_A_SEED}
        yield {"method": way, "keep": size, **more, "texts": {"evaluation": {**means, "seeds": seeds}}}


@dataclass(frozen=True)
class Ground:
    """The dense model of a recipe with its spectra, a held-out text [n, t], and the dense model's perplexity on it."""

    recipe: Recipe
    subject: Subject
    evaluation: torch.Tensor
    dense: float

    @staticmethod
    def open(recipe: Recipe, folder: Path) -> Ground:
        """Load the model and its texts, and make its spectra in `folder`."""
        model, tokenizer = load_model(recipe)[0], load_tokenizer(recipe)
        calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens
        evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens
        subject = method.open_subject(model, recipe.layers, calibration, folder / "spectrum")
        method.make_spectra(subject, recipe.train)
        dense = measure_perplexity(torch_decoder(model, "dense"), evaluation).value
        return Ground(recipe, subject, evaluation, dense)

    def row(self, way: str, size: float, factors: Factors, **figures: float) -> Row:
        """Return, and print, the perplexity of the model with `factors`, its ratio to the dense, and `figures`."""
        pruned = load_model(self.recipe)[0]
        apply_factors(pruned, factors.layers)
        value = measure_perplexity(torch_decoder(pruned, way), self.evaluation).value
        row = {"way": way, "size": size, "perplexity": value, "ratio": value / self.dense, **figures}
        print(row, flush=True)
        return row
