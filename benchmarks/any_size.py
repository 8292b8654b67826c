"""One distillation for all sizes (refine.distill.sizes) beside one for each size, with the same calibration tokens.

Run from the root of the repository: python -m benchmarks.any_size --out benchmarks/results/any-size.json

From one set of scores, by default on the built-in model. `each`: a distillation for every size, T tokens each. `one`:
mixed-rank, as many tokens as all of `each` together, in steps that see a batch twice (all components, and fewer);
`largest`: the distillation of the largest size alone, with as many tokens, its factors cut afterwards (post-hoc, in
score order); `none`: the cut without distillation.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from benchmarks.ways import Ground, Row, options, write
from soco_export.recipe.recipe import Recipe
from soco_train import method
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.any_size import Planner, cut_to
from soco_train.refine.distill import distill
from soco_train.settings.refine import RefineSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores


def main() -> None:
    parser = options(__doc__, steps=30)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    given = parser.parse_args()
    write(given, ["train.deviation=false"], partial(measure, given), tokens_a_size=given.steps * given.batch)


def measure(given: argparse.Namespace, recipe: Recipe, folder: Path) -> list[Row]:
    """Return a row for each size and way; `given.steps` are for each size."""
    sizes, steps = given.sizes, given.steps
    ground = Ground.open(recipe, folder)
    subject = ground.subject
    seed = recipe.train.seed
    scores = method.learn_scores(subject, recipe.train, recipe.plan, Session(folder / "scores", seed=seed))

    def planner(size: float) -> RankPlan:
        return plan_ranks(scores, recipe.plan.model_copy(update={"keep_params": size}))

    def refine(steps: int, **more: Any) -> RefineSettings:
        own = {**recipe.refine.distill.model_dump(), "steps": steps, "batch_tokens": given.batch, **more}
        return RefineSettings.model_validate({"distill": own})

    def one_size(steps: int) -> Callable[[float], Factors]:
        def make(size: float) -> Factors:
            session = Session(folder / f"{steps}-{size}", fingerprint=f"{steps} {size}", seed=seed)
            return method.cut_factors(subject, scores, planner(size), refine(steps), session)

        return make

    def all_sizes(name: str, make: Callable[..., Factors]) -> Callable[[float], Factors]:
        settings = refine(steps * len(sizes), sizes=(min(sizes), max(sizes)))
        session = Session(folder / name, fingerprint=name, seed=seed)
        made = cache(partial(make, subject, scores, planner, settings, session))
        return lambda size: cut_to(made(), planner(size))

    ways: Mapping[str, Callable[[float], Factors]] = {
        "none": one_size(0),
        "each": one_size(steps),
        "one": all_sizes("sizes", method.distill_sizes),
        "largest": all_sizes("largest", _all_components),
    }
    return [ground.row(way, size, ways[way](size)) for way in given.ways or ways for size in sizes]


def _all_components(
    subject: Subject, scores: Scores, planner: Planner, settings: RefineSettings, session: Session
) -> Factors:
    """Distil the largest size alone, in score order: what a smaller one loses that was never trained for."""
    untrained = settings.model_copy(update={"distill": settings.distill.model_copy(update={"steps": 0})})
    ordered = method.distill_sizes(subject, scores, planner, untrained, session)
    layers = {name: layer for name, layer in ordered.layers.items() if isinstance(layer, StackedFactors)}
    return Factors(distill(subject, layers, settings.distill, session), ordered.provenance)


if __name__ == "__main__":
    main()
