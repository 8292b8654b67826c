"""Values of fewer numbers in the same budget as ranks: is a parameter better saved by one or by the other?

    python -m benchmarks.kv.budget --out benchmarks/kv/budget.json

At each size, all with as many parameters left of the same layers: `ranks`: ranks alone, by price. A share: every value
head keeps so many of its numbers (refine.values.keep), and the other layers have what is left. `planned`: attention by
attention whichever loses less. Perplexity of the closed form, and distilled with `--steps`; bytes that a token takes in
the cache, float32.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.ways import Ground, Row, options, write
from soco_export.recipe.recipe import Recipe
from soco_train import method
from soco_train.modules.subject import Session, Subject
from soco_train.modules.values import value_sites
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.refine import RefineSettings, ValueSettings

KEEP: dict[str, Any] = {"ranks": 1, "0.75": 0.75, "0.5": 0.5, "0.25": 0.25, "planned": "planned"}
SETTINGS = ("train.scorer=singular-values", "train.basis=two-sided", "allocation=lagrangian")


def main() -> None:
    parser = options(__doc__, steps=60)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6])
    given = parser.parse_args()
    write(given, SETTINGS, partial(measure, given), tokens=given.steps * given.batch)


def measure(given: argparse.Namespace, recipe: Recipe, folder: Path) -> list[Row]:
    """Return a row for each way and size, in closed form and distilled."""
    ground = Ground.open(recipe, folder)
    rows = []
    for way in given.ways or KEEP:
        values = ValueSettings(keep=KEEP[way], blocks=recipe.train.statistics_blocks)
        model, tokens = ground.subject.model, ground.subject.tokens
        subject = method.open_subject(model, recipe.layers, tokens, folder / "spectrum", values)
        session = Session(folder / way, seed=recipe.train.seed)
        scores = method.learn_scores(subject, recipe.train, recipe.plan, session)
        for size, steps in product(given.sizes, sorted({0, given.steps})):
            keep = _for_the_rest(subject, ground.subject, size)
            plan = plan_ranks(scores, recipe.plan.model_copy(update={"keep_params": keep}))
            distill = {**recipe.refine.distill.model_dump(), "steps": steps, "batch_tokens": given.batch}
            refine = RefineSettings.model_validate({"distill": distill, "values": values.model_dump()})
            named = replace(session, workdir=folder / f"{way}-{size}-{steps}", fingerprint=f"{way} {size} {steps}")
            made = method.cut_factors(subject, scores, plan, refine, named)
            cache = _cache_bytes(model, plan, values)
            rows.append(ground.row(f"{way}, distilled" if steps else way, size, made, cache_bytes_a_token=cache))
    return rows


def _for_the_rest(subject: Subject, whole: Subject, size: float) -> float:
    """Return the share of the layers with ranks that stays where `size` of all layers does."""
    total, ranked = (sum(linear.weight.numel() for linear in one.linears.values()) for one in (whole, subject))
    apart = total - ranked - sum(weight.dropped for weight in subject.left_out.values())
    return (size * total - apart) / ranked


def _cache_bytes(model: Any, plan: RankPlan, values: ValueSettings) -> int:
    chosen = plan.fewer_values(values)
    sites = value_sites(model)
    return sum(4 * site.groups * (site.size + chosen.numbers(site.size, site.value)) for site in sites)


if __name__ == "__main__":
    main()
