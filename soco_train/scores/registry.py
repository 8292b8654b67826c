"""The scorers by name: a scorer is one decorated function from a ScoringTask to Scores."""

from __future__ import annotations

from collections.abc import Callable

from soco_train.errors import RecipeError
from soco_train.scores.task import ScoringTask
from soco_train.store.scores import Scores

Scorer = Callable[[ScoringTask], Scores]
SCORERS: dict[str, Scorer] = {}


def scorer(name: str) -> Callable[[Scorer], Scorer]:
    """Register a scorer under the name that `train.scorer` uses."""

    def register(function: Scorer) -> Scorer:
        SCORERS[name] = function
        return function

    return register


def train_scores(task: ScoringTask) -> Scores:
    """Score every component of every participating layer with `task.train.scorer`.

    Returns Scores (importance, scale, deviation by layer). Raises RecipeError for an unknown scorer and DataError for a
    loss that is not finite. Resumes from `task.workdir` where the scorer trains.
    """
    return find_scorer(task.train.scorer)(task)


def find_scorer(name: str) -> Scorer:
    """Return a registered scorer; RecipeError for an unknown name."""
    if name not in SCORERS:
        raise RecipeError(f"unknown scorer {name!r}", fix=f"one of {', '.join(SCORERS)}", where="recipe: train.scorer")
    return SCORERS[name]
