"""The time that a part has. It is handed to whatever reports events, and ends it between two of them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.scale.parts import TimeUp
from soco_train.events import Event


@dataclass
class TimeBox:
    """`seconds` from now on."""

    seconds: float
    clock: Callable[[], float] = time.monotonic
    started: float = field(init=False)

    def __post_init__(self) -> None:
        self.started = self.clock()

    @property
    def left(self) -> float:
        """Seconds that are left, never below zero."""
        return max(0.0, self.seconds - (self.clock() - self.started))

    def check(self) -> None:
        """Raise TimeUp if nothing is left."""
        if not self.left:
            raise TimeUp

    def __call__(self, event: Event) -> None:
        """Take an event: the box is a `notify`."""
        self.check()


def shares(minutes: float, weights: list[float]) -> list[float]:
    """Return the seconds of each section: what the earlier ones leave over goes to the later ones as it comes."""
    return [60 * minutes * weight / sum(weights) for weight in weights]
