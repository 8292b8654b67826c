"""After the cut, rung by rung: compensation → the factors → refit → distillation → the form they are stored in.

Each rung is a section of the recipe (`refine.compensate`, `refine.refit`, `refine.distill`) and does nothing unless it
is asked for, so that an ablation is one key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from soco_train.forms.base import LayerFactors
from soco_train.forms.dense import DenseWeight
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.optimiser import check_optimiser
from soco_train.modules.subject import Session, Subject
from soco_train.numbers.rounding import check_rounding, trains_dense
from soco_train.plan.ranks import RankPlan
from soco_train.refine.compensate import compensate
from soco_train.refine.cut import make_factors, store_as
from soco_train.refine.distill import distill
from soco_train.refine.refit import refit
from soco_train.settings import DistillSettings, RefineSettings, Storage
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores


def refine(
    subject: Subject,
    scores: Scores,
    plan: RankPlan,
    settings: RefineSettings,
    session: Session,
    provenance: Mapping[str, object],
) -> Factors:
    """Cut every pruned layer of `plan`, climb the rungs that the settings ask for, and store as planned.

    What no rung holds in memory as a whole is made layer by layer, each time that the result is asked for a layer;
    until then the spectra must stay as they are.
    Raises RecipeError for what distillation cannot do, before anything is cut, DataError for a loss that is not finite.
    """
    if settings.distill.steps:
        check_rounding(settings.distill.rounding, plan.storage)
        check_optimiser(settings.distill.optimiser)
    if settings.compensate.blocks:
        scores = compensate(subject, scores, plan, settings.compensate, session.notify)
    factors: Mapping[str, StackedFactors] = make_factors(subject.spectra, scores, plan, subject.linears)
    if settings.refit.blocks and factors:
        factors = refit(subject.model, subject.linears, factors, subject.tokens, settings.refit, session.notify)
    if settings.distill.steps and (factors or _trains_dense(subject, settings.distill)):
        factors = dict(factors)
        named = session.named(_distillation(settings.distill, factors, session))
        return Factors(_stored(distill(subject, factors, settings.distill, named), plan.storage), provenance)
    return Factors(store_as(factors, plan.storage), provenance)


def _stored(trained: Mapping[str, LayerFactors], storage: Storage) -> Mapping[str, LayerFactors]:
    """Return factors in the form the plan counted on, dense weights as they are."""
    dense = {name: layer for name, layer in trained.items() if isinstance(layer, DenseWeight)}
    factors = {name: layer for name, layer in trained.items() if isinstance(layer, StackedFactors)}
    stored = store_as(factors, storage)
    return {**stored, **dense} if dense else stored


def _trains_dense(subject: Subject, settings: DistillSettings) -> bool:
    return any(trains_dense(settings.rounding, name) for name in subject.linears)


def _distillation(settings: DistillSettings, factors: Mapping[str, StackedFactors], session: Session) -> str:
    """Name the distillation of these factors with these settings."""
    parts = [
        session.fingerprint,
        settings.model_dump_json(exclude={"checkpoint_every", "checkpoint_activations", "shard"}),
    ]
    parts += [f"{float(layer.up.norm())} {float(layer.down.norm())}" for layer in factors.values()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
