"""The rungs between cut and storage by name.

A rung is one decorated function, and a section of `refine` under its name with a key that is 0 while it is off. Some
work on the scores before the cut, the others on the stacked factors after it. What they cost and refuse stands in the
decorator, for preflight and cost card.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from soco_train.cost import CostOf, free
from soco_train.settings.plan import Storage
from soco_train.settings.refine import RefineSettings
from soco_train.settings.section import Section

_Place = Literal["scores", "factors"]
# on scores: (subject, scores, plan, section, session) → Scores; on factors: (subject, factors, section, session) →
# StackedFactors by layer
_Run = Callable[..., Any]
_Check = Callable[[Any, Storage], None]


def _anything(settings: Any, storage: Storage) -> None:
    """Refuse nothing."""


@dataclass(frozen=True)
class Rung:
    """A refinement and what is to be known of it before it runs.

    switch: the key of its section that is 0 while it is off; trains: over batches, with a phase of its own on the cost
    card; check: raises RecipeError for settings that it cannot do.
    """

    name: str
    on: _Place
    switch: str
    run: _Run
    trains: bool
    check: _Check
    cost: CostOf

    def wanted(self, settings: RefineSettings) -> bool:
        """Tell whether the settings ask for it."""
        return bool(getattr(settings.of_step(self.name), self.switch))


RUNGS: dict[str, Rung] = {}


def rung(
    name: str,
    *,
    on: _Place,
    switch: str,
    section: type[Section] | None = None,
    trains: bool = False,
    check: _Check = _anything,
    cost: CostOf = free,
) -> Callable[[_Run], _Run]:
    """Register a rung under the name of its section of `refine`; `section`: one that RefineSettings does not have."""

    def register(function: _Run) -> _Run:
        RUNGS[name] = Rung(name, on, switch, function, trains, check, cost)
        if section is not None:
            RefineSettings.of_steps[name] = section
        return function

    return register


def wanted_rungs(settings: RefineSettings, on: _Place | None = None) -> list[Rung]:
    """Return the rungs that the settings ask for, in the order in which they are climbed.

    What is solved in closed form comes before what is trained; else they come as they were registered. `on`: those that
    work on scores, or on factors.
    """
    asked = [rung for rung in RUNGS.values() if rung.wanted(settings) and on in (None, rung.on)]
    return sorted(asked, key=lambda rung: rung.trains)
