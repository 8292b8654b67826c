"""The scorers by name: a scorer is one decorated function from a Subject and its settings to Scores."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from soco_train.errors import RecipeError
from soco_train.modules.subject import Session, Subject
from soco_train.settings import PlanSettings, TrainSettings
from soco_train.store.scores import Scores

Scorer = Callable[[Subject, TrainSettings, PlanSettings, Session], Scores]
SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Register a scorer under the name that `train.scorer` uses."""

    def register(function: Scorer) -> Scorer:
        SCORERS[name] = function
        return function

    return register


def train_scores(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Score every component of every participating layer with `train.scorer`, heading for the size of `plan`.

    Returns Scores (importance, scale, deviation by layer). Raises RecipeError for an unknown scorer and DataError for a
    loss that is not finite. A scorer that trains goes on from the checkpoint in `session.workdir`; the session's
    fingerprint has to name the model and the text, the settings are added here.
    """
    score = find_scorer(train.scorer)
    if train.keep_params is not None:
        plan = plan.model_copy(update={"keep_params": train.keep_params})
    return score(subject, train, plan, session.named(_fingerprint(subject, train, plan, session)))


def find_scorer(name: str) -> Scorer:
    """Return a registered scorer; RecipeError for an unknown name."""
    if name not in SCORERS:
        raise RecipeError(f"unknown scorer {name!r}", fix=f"one of {', '.join(SCORERS)}", where="recipe: train.scorer")
    return SCORERS[name]


def _fingerprint(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> str:
    """Name this task: settings, plan, layers, and what the session adds; another one's checkpoint is not continued."""
    parts = [
        train.model_dump(mode="json", exclude={"checkpoint_every"}),
        plan.model_dump(mode="json"),
        {name: list(linear.weight.shape) for name, linear in subject.linears.items()},
        session.fingerprint,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
