"""One distillation for all sizes (refine.distill.sizes) beside one for each size, with the same calibration tokens.

Run from the root of the repository: python -m benchmarks.any_size --out benchmarks/results/any-size.json

On the built-in model, from one set of scores. `each`: a distillation for every size, T tokens each. `one`: mixed-rank,
as many tokens as all of `each` together, in steps that see a batch twice (all components, and fewer); `largest`: the
distillation of the largest size alone, with as many tokens, its factors cut afterwards (post-hoc, in score order);
`none`: the cut without distillation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from soco_export.checkpoint.layers import apply_factors
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.model.load import load_model, load_tokenizer
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_export.runtimes.open import torch_decoder
from soco_train import method
from soco_train.data.corpus import load_blocks
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import RankPlan, plan_ranks
from soco_train.refine.any_size import Planner, cut_to
from soco_train.refine.distill import distill
from soco_train.settings import RefineSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores

FIGURES = {"mean": "perplexity", "ratio": "ratio"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6, 0.4])
    parser.add_argument("--steps", type=int, default=30, help="of 1024 tokens, for each size")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    rows = []
    for seed in given.seeds:
        recipe = load_recipe("tiny", ["train.deviation=false", f"train.seed={seed}", *given.settings])
        with tempfile.TemporaryDirectory() as folder:
            rows += [{"seed": seed, **row} for row in measure(recipe, given.sizes, given.steps, Path(folder))]
    command = f"python -m benchmarks.any_size --steps {given.steps} --sizes {' '.join(map(str, given.sizes))}"
    command += "".join(f" --set {setting}" for setting in given.settings)
    document = {
        "command": f"{command} --seeds {' '.join(map(str, given.seeds))}",
        "tokens_a_size": given.steps * 1024,
        "rows": list(by_way(rows)),
    }
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def by_way(rows: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield a row for each way and size: the mean over seeds, and its ratio to the dense model."""
    for way, size in dict.fromkeys((row["way"], row["size"]) for row in rows):
        own = [row for row in rows if (row["way"], row["size"]) == (way, size)]
        means = {name: sum(row[key] for row in own) / len(own) for name, key in FIGURES.items()}
        seeds = {str(row["seed"]): row["perplexity"] for row in own}
        yield {"method": way, "keep": size, "texts": {"evaluation": {**means, "seeds": seeds}}}


def measure(recipe: Recipe, sizes: list[float], steps: int, folder: Path) -> list[dict[str, Any]]:
    """Return a row for each size and way: perplexity on held-out text, and its ratio to the dense model's."""
    model, tokenizer = load_model(recipe)[0], load_tokenizer(recipe)
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens
    subject = method.open_subject(model, recipe.layers, calibration, folder / "spectrum")
    method.make_spectra(subject, recipe.train)
    seed = recipe.train.seed
    scores = method.learn_scores(subject, recipe.train, recipe.plan, Session(folder / "scores", seed=seed))

    def planner(size: float) -> RankPlan:
        return plan_ranks(scores, recipe.plan.model_copy(update={"keep_params": size}))

    def refine(steps: int, **more: Any) -> RefineSettings:
        given = {**recipe.refine.distill.model_dump(), "steps": steps, "batch_tokens": 1024, **more}
        return RefineSettings.model_validate({"distill": given})

    def one_size(steps: int) -> Callable[[float], Factors]:
        def make(size: float) -> Factors:
            session = Session(folder / f"{steps}-{size}", fingerprint=f"{steps} {size}", seed=seed)
            return method.cut_factors(subject, scores, planner(size), refine(steps), session)

        return make

    ends, together = (min(sizes), max(sizes)), steps * len(sizes)
    session = Session(folder / "sizes", fingerprint="sizes", seed=seed)
    mixed = method.distill_sizes(subject, scores, planner, refine(together, sizes=ends), session)
    session = Session(folder / "largest", fingerprint="largest", seed=seed)
    largest = _all_components(subject, scores, planner, refine(together, sizes=ends), session)
    ways: Mapping[str, Callable[[float], Factors]] = {
        "none": one_size(0),
        "each": one_size(steps),
        "one": lambda size: cut_to(mixed, planner(size)),
        "largest": lambda size: cut_to(largest, planner(size)),
    }
    dense = measure_perplexity(torch_decoder(model, "dense"), evaluation).value
    rows = []
    for way, make in ways.items():
        for size in sizes:
            pruned = load_model(recipe)[0]
            apply_factors(pruned, make(size).layers)
            value = measure_perplexity(torch_decoder(pruned, way), evaluation).value
            rows.append({"way": way, "size": size, "perplexity": value, "ratio": value / dense})
            print(rows[-1], flush=True)
    return rows


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
