"""After the cut, rung by rung: compensation → the factors → refit → distillation → the form they are stored in.

Each rung is a section of the recipe (`refine.compensate`, `refine.refit`, `refine.distill`, and what is registered
beside them: rungs.py) and does nothing unless it is asked for, so that an ablation is one key.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from soco_train.errors import RecipeError
from soco_train.forms.base import LayerFactors
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.refine.cut import cut_layers, store_as
from soco_train.refine.rungs import wanted_rungs
from soco_train.settings.refine import RefineSettings
from soco_train.settings.section import Section
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
    Raises RecipeError for what a rung cannot do, before anything is cut, DataError for a loss that is not finite.
    """
    if settings.distill.sizes:
        raise RecipeError(
            "refine.distill.sizes distils all sizes at once, before one is cut",
            fix="soco_train.method.distill_sizes and cut_to, or leave sizes out",
            where="recipe: refine.distill.sizes",
        )
    if settings.values.planned and "values" not in scores.provenance:
        raise RecipeError(
            "these scores do not say what fewer numbers a value head lose, so no plan of them chose any",
            fix="learn the scores in a run with the same refine.values, or give a share",
            where="recipe: refine.values.keep",
        )
    settings = settings.model_copy(update={"values": plan.fewer_values(settings.values)})
    for rung in wanted_rungs(settings):
        rung.check(settings.of_step(rung.name), plan.storage)
    for rung in wanted_rungs(settings, on="scores"):
        scores = rung.run(subject, scores, plan, settings.of_step(rung.name), session)
    layers: Mapping[str, LayerFactors] = cut_layers(subject.spectra, scores, plan, subject.linears)
    for rung in wanted_rungs(settings, on="factors"):
        own, named = settings.of_step(rung.name), session
        if rung.trains:  # all of them, in memory, until the last step
            layers = dict(layers)
            named = session.named(name_training(own, layers, session))
        layers = rung.run(subject, layers, own, named)
    return Factors(store_as(layers, plan.storage, plan.forms), provenance)


def name_training(settings: Section, layers: Mapping[str, LayerFactors], session: Session) -> str:
    """Return a name for the training of these layers with these settings; another one's checkpoint is not continued."""
    parts = [
        session.fingerprint,
        settings.model_dump_json(exclude={"checkpoint_every", "checkpoint_activations", "shard"}),
    ]
    tensors = [part for layer in layers.values() for part in vars(layer).values() if part is not None]
    parts += [str(float(part.norm())) for part in tensors if part.is_floating_point()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
