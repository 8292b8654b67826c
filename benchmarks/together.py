"""Learnt scores and distilled factors in other orders than one after the other, with the same calibration tokens.

Run from the root of the repository: python -m benchmarks.together --out benchmarks/results/together.json

On the two-sided basis, no deviation, `--steps` batches for each way; the built-in model, if no other is said:
`distilled`: ranks by price, and all tokens for the factors (the control). `scores, then factors`: half for each.
`together`: half for scores and components in the same steps (`train.lr_factors`), half for the factors that are left.
`learnt again`: two fifths for the factors of the size halfway to 1 by price, one fifth for scores of what is left of
them, two for the final size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import nn

from benchmarks.ways import Ground, Row, options, write
from soco_export.recipe.recipe import Recipe
from soco_train import method
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from soco_train.store.spectra import Spectrum

METHOD = ("train.basis=two-sided", "train.start=spectrum", "train.deviation=false")


def main() -> None:
    parser = options(__doc__, steps=100)
    parser.add_argument("--size", type=float, default=0.6, help="keep_params")
    given = parser.parse_args()
    write(given, [f"keep_params={given.size}", *METHOD], partial(measure, given), tokens=given.steps * given.batch)


def measure(given: argparse.Namespace, recipe: Recipe, folder: Path) -> list[Row]:
    """Return a row for each way to spend `given.steps`."""
    ground = Ground.open(recipe, folder)
    work = Work(recipe, ground.subject, folder, given.batch)
    ways: Mapping[str, Callable[[int], Factors]] = {
        "distilled": work.distilled,
        "scores, then factors": work.one_after_the_other,
        "together": work.together,
        "learnt again": work.learnt_again,
    }
    return [ground.row(way, given.size, ways[way](given.steps)) for way in given.ways or ways]


@dataclass(frozen=True)
class Work:
    """The four ways to spend steps on one subject; each returns factors of the size of the recipe's plan."""

    recipe: Recipe
    subject: Subject
    folder: Path
    batch: int

    def distilled(self, steps: int) -> Factors:
        """Cut by price, then distil."""
        return self._distilled(self.subject, self._by_price(), steps, "distilled")

    def one_after_the_other(self, steps: int) -> Factors:
        """Learn scores, then distil."""
        scores = method.learn_scores(self.subject, self._train(steps // 2), self.recipe.plan, self._session("after"))
        return self._distilled(self.subject, scores, steps - steps // 2, "after")

    def together(self, steps: int) -> Factors:
        """Learn scores and components in the same steps, then distil what is left."""
        train = self._train(steps // 2).model_copy(update={"lr_factors": self.recipe.refine.distill.lr})
        scores = method.learn_scores(self.subject, train, self.recipe.plan, self._session("together"))
        return self._distilled(self.subject, scores, steps - steps // 2, "together")

    def learnt_again(self, steps: int) -> Factors:
        """Distil a larger size, learn scores of what it kept, cut to the size, and distil on."""
        first, middle = 2 * steps // 5, steps // 5
        prices = self._by_price()
        own = {"keep_params": (1 + self.recipe.plan.keep_params) / 2, "allocation": "lagrangian"}
        larger = plan_ranks(prices, self.recipe.plan.model_copy(update=own))
        factors = method.cut_factors(self.subject, prices, larger, self._refine(first), self._session("larger"))
        subject = replace(self.subject, spectra=self._left_of(factors, prices, larger))
        scores = method.learn_scores(subject, self._train(middle), self.recipe.plan, self._session("again"))
        return self._distilled(subject, scores, steps - first - middle, "again")

    def _left_of(self, factors: Factors, scores: Scores, plan: RankPlan) -> dict[str, Spectrum]:
        """Return the distilled components with the σ that they were cut for; those that were lost are zeros."""
        found = {}
        for name, spectrum in self.subject.spectra.items():
            pair = factors.layers.get(name)
            if isinstance(pair, StackedFactors):
                lost = spectrum.sigma.numel() - len(pair.down)
                sigma = spectrum.sigma[kept(scores.layers[name].importance, plan.layers[name].rank)]
                up, down = nn.functional.pad(pair.up, (0, lost)), nn.functional.pad(pair.down, (0, 0, 0, lost))
                spectrum = Spectrum(up, down, nn.functional.pad(sigma, (0, lost)))
            found[name] = spectrum
        return found

    def _by_price(self) -> Scores:
        train = TrainSettings.model_validate({"scorer": "singular-values", "basis": "two-sided"})
        return method.learn_scores(self.subject, train, self.recipe.plan, self._session("price"))

    def _distilled(self, subject: Subject, scores: Scores, steps: int, name: str) -> Factors:
        """Cut and distil; ranks by price where scores are prices, by the scores' own order where they are learnt."""
        priced = scores.provenance["scorer"] != "soco"
        own = {"allocation": "lagrangian" if priced else "global"}
        plan = plan_ranks(scores, self.recipe.plan.model_copy(update=own))
        return method.cut_factors(subject, scores, plan, self._refine(steps), self._session(f"distil {name}")).made()

    def _train(self, steps: int) -> TrainSettings:
        return self.recipe.train.model_copy(update={"steps": steps, "batch_tokens": self.batch})

    def _refine(self, steps: int) -> RefineSettings:
        given = {**self.recipe.refine.distill.model_dump(), "steps": steps, "batch_tokens": self.batch}
        return RefineSettings.model_validate({"distill": given})

    def _session(self, name: str) -> Session:
        return Session(self.folder / name, fingerprint=name, seed=self.recipe.train.seed)


if __name__ == "__main__":
    main()
