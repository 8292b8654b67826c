"""After the cut, rung by rung: compensation → the factors → refit → distillation → the form they are stored in.

Each rung is a section of the recipe (`refine.compensate`, `refine.refit`, `refine.distill`) and does nothing unless it
is asked for, so that an ablation is one key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from soco_train.events import Notify
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.optimiser import check_optimiser
from soco_train.modules.subject import Subject
from soco_train.numbers.rounding import check_rounding
from soco_train.plan.ranks import RankPlan
from soco_train.refine.compensate import compensate
from soco_train.refine.cut import make_factors, store_as
from soco_train.refine.distill import DistillTask, distill
from soco_train.refine.refit import refit
from soco_train.settings import RefineSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores


@dataclass(frozen=True)
class RefineTask(Subject):
    """A subject whose scores are known.

    `workdir` receives the distillation's checkpoints; `fingerprint` names the task beyond settings, scores and plan;
    `remember_in`: see DistillTask.
    """

    settings: RefineSettings
    workdir: Path
    notify: Notify
    seed: int = 0
    fingerprint: str = ""
    remember_in: Path | None = None


def refine(task: RefineTask, scores: Scores, plan: RankPlan, provenance: Mapping[str, object]) -> Factors:
    """Cut every pruned layer of `plan`, climb the rungs that the settings ask for, and store as planned.

    What no rung holds in memory as a whole is made layer by layer, each time that the result is asked for a layer;
    until then the spectra must stay as they are.
    Raises RecipeError for what distillation cannot do, before anything is cut, DataError for a loss that is not finite.
    """
    settings, tokens = task.settings, task.tokens
    if settings.distill.steps:
        check_rounding(settings.distill.rounding, plan.storage)
        check_optimiser(settings.distill.optimiser)
    if settings.compensate.blocks:
        scores = compensate(task, scores, plan, settings.compensate, task.notify)
    factors: Mapping[str, StackedFactors] = make_factors(task.spectra, scores, plan, task.linears)
    if settings.refit.blocks and factors:
        factors = refit(task.model, task.linears, factors, tokens, settings.refit, task.notify)
    if settings.distill.steps and factors:
        factors = _distilled(task, dict(factors))
    return Factors(store_as(factors, plan.storage), provenance)


def _distilled(task: RefineTask, factors: Mapping[str, StackedFactors]) -> dict[str, StackedFactors]:
    parts = [
        task.fingerprint,
        task.settings.distill.model_dump_json(exclude={"checkpoint_every", "checkpoint_activations", "shard"}),
    ]
    parts += [f"{float(layer.up.norm())} {float(layer.down.norm())}" for layer in factors.values()]
    return distill(
        DistillTask(
            model=task.model,
            linears=task.linears,
            tokens=task.tokens,
            settings=task.settings.distill,
            workdir=task.workdir,
            notify=task.notify,
            seed=task.seed,
            fingerprint=hashlib.sha256("\n".join(parts).encode()).hexdigest(),
            remember_in=task.remember_in,
        ),
        factors,
    )
