"""The scorers by name: a scorer is one decorated function from a Subject and its settings to Scores.

What else there is to know of it stands in the decorator: the keys of `train` that it reads, whether it trains, what it
costs, what it refuses, and a section of settings of its own. Preflight, cost card and report ask the registry alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from soco_train.cost import CostOf, free
from soco_train.errors import RecipeError
from soco_train.modules.subject import Session, Subject
from soco_train.settings.plan import PlanSettings
from soco_train.settings.section import Section
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import Scores

_Run = Callable[[Subject, TrainSettings, PlanSettings, Session], Scores]
_Check = Callable[[TrainSettings, PlanSettings], None]
# read before a scorer begins: what the spectra are made from, the size it heads for, where and how the model computes
READ_BY_ALL = {
    "scorer",
    "basis",
    "ridge",
    "statistics_blocks",
    "statistics_memory",
    "keep_params",
    "seed",
    "factor_dtype",
}


def _anything(train: TrainSettings, plan: PlanSettings) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Scorer:
    """A way to score components, and what is to be known of it before it runs.

    reads: keys of `train` beside those that every scorer's run reads; trains: it learns over `train.steps` batches;
    check: raises RecipeError for settings that it cannot do; cost: None where its computation is negligible.
    """

    run: _Run
    reads: frozenset[str]
    trains: bool
    check: _Check
    cost: CostOf

    def deviates(self, train: TrainSettings) -> bool:
        """Tell whether it learns a deviation for each layer, which becomes its bias."""
        return train.deviation and "deviation" in self.reads

    def unread(self, train: TrainSettings) -> list[str]:
        """Return the keys of `train` that are set, other than their defaults, and that it does not read."""
        read = READ_BY_ALL | self.reads | {train.scorer}
        defaults = TrainSettings()
        given = [*type(train).model_fields, *(train.model_extra or {})]
        return [key for key in given if key not in read and getattr(train, key) != getattr(defaults, key, None)]


SCORERS: dict[str, Scorer] = {}


def scorer(
    name: str,
    *,
    reads: Iterable[str] = (),
    trains: bool = False,
    section: type[Section] | None = None,
    check: _Check = _anything,
    cost: CostOf = free,
) -> Callable[[_Run], _Run]:
    """Register a scorer under the name that `train.scorer` uses; `section`: its own, under `train` and its name."""

    def register(function: _Run) -> _Run:
        SCORERS[name] = Scorer(function, frozenset(reads), trains, check, cost)
        if section is not None:
            TrainSettings.of_steps[name] = section
        return function

    return register


def train_scores(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
    """Score every component of every participating layer with `train.scorer`, heading for the size of `plan`.

    Returns Scores (importance, scale, deviation by layer). Raises RecipeError for an unknown scorer and DataError for a
    loss that is not finite. A scorer that trains goes on from the checkpoint in `session.workdir`; the session's
    fingerprint has to name the model and the text, the settings are added here.
    """
    chosen = find_scorer(train.scorer)
    if train.keep_params is not None:
        plan = plan.model_copy(update={"keep_params": train.keep_params})
    return chosen.run(subject, train, plan, session.named(_fingerprint(subject, train, plan, session)))


def find_scorer(name: str) -> Scorer:
    """Return a registered scorer; RecipeError for an unknown name."""
    if name not in SCORERS:
        raise RecipeError(f"unknown scorer {name!r}", fix=f"one of {', '.join(SCORERS)}", where="recipe: train.scorer")
    return SCORERS[name]


def _fingerprint(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> str:
    """Name this task: settings, plan, layers, and what the session adds; another one's checkpoint is not continued."""
    parts = [
        train.model_dump(mode="json", exclude={"checkpoint_every", "statistics_memory"}),
        plan.model_dump(mode="json"),
        {name: list(linear.weight.shape) for name, linear in subject.linears.items()},
        session.fingerprint,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
