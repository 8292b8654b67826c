"""The exact calls for a GPU machine that is at hand for minutes: what each carries, what it runs, how long. Pure.

Sections run in order of worth, each in the first call that has what it needs; what is still to be carried for the last
one travels with the calls before it. The limits leave room for the machine's start and for what every call costs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

NEEDS = {"a": ("wheel",), "b": ("wheel", "text", "weights"), "c": ("wheel",), "d": ("wheel", "runtime")}
WEIGHT = {"a": 1.0, "b": 5.0, "c": 4.0, "d": 2.0}
LEAST = {"a": 45.0, "b": 150.0, "c": 120.0, "d": 60.0}  # seconds below which a section is not worth its call


@dataclass(frozen=True)
class Budget:
    """Seconds: total; of the machine's start; that a call costs beside its command; of taking a load in; of one call.

    build: of making the model's folder from its weights; grace: what a section may overrun its own time by.
    """

    total: float = 870
    start: float = 100
    call: float = 10
    join: float = 8
    build: float = 60
    grace: float = 20
    longest: float = 600


@dataclass(frozen=True)
class Call:
    """load: its number, None if nothing is carried; sections: letters; seconds: of the sections; limit: of the call."""

    load: int | None
    sections: str
    seconds: float
    limit: float


def plan(kinds: Sequence[Sequence[str]], sections: str, budget: Budget) -> list[Call]:
    """Return the calls. kinds: of each load, of which kinds of file something arrives with it.

    What a call may not be long enough for is left over: the same call goes on. Raises ValueError if less time is left
    than the sections need.
    """
    at = _placed(kinds, sections)
    calls = max([len(kinds), *(place + 1 for place in at.values())])
    built = max((number for number, own in enumerate(kinds) if "weights" in own), default=-1)

    def beside(number: int) -> float:
        """Seconds of a call that are no section's."""
        takes_in = (number < len(kinds)) * budget.join + (number == built) * budget.build
        return takes_in + budget.grace * sum(place == number for place in at.values())

    left = budget.total - budget.start - sum(budget.call + beside(number) for number in range(calls))
    given = _given(sections, left)
    found = []
    for number in range(calls):
        own = "".join(letter for letter in sections if at[letter] == number)
        seconds = min(sum(given[letter] for letter in own), budget.longest - beside(number))
        found.append(Call(number if number < len(kinds) else None, own, seconds, seconds + beside(number)))
    return found


def _placed(kinds: Sequence[Sequence[str]], sections: str) -> dict[str, int]:
    """Return the call of each section, in order: one a call, unless all has arrived."""
    arrived = {kind: max(number for number, own in enumerate(kinds) if kind in own) for own in kinds for kind in own}
    at: dict[str, int] = {}
    least = 0
    for letter in sections:
        missing = set(NEEDS[letter]) - set(arrived)
        if missing - {"text", "wheel"}:
            raise ValueError(f"section {letter} needs {', '.join(sorted(missing))}, which nothing carries")
        at[letter] = max([least, *(arrived.get(kind, 0) for kind in NEEDS[letter])])
        least = at[letter] + 1
    return at


def _given(sections: str, left: float) -> Mapping[str, float]:
    whole = sum(WEIGHT[letter] for letter in sections)
    spare = left - sum(LEAST[letter] for letter in sections)
    if spare < 0:
        raise ValueError(f"{left:.0f} s are left for sections {sections}, which need {left - spare:.0f}: leave one out")
    return {letter: LEAST[letter] + spare * WEIGHT[letter] / whole for letter in sections}


def taken(calls: Sequence[Call], budget: Budget) -> float:
    """Return the seconds that all of it takes at most."""
    return budget.start + sum(call.limit + budget.call for call in calls)
