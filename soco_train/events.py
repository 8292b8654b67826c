"""What long-running work reports while it runs. The library never prints; the console decides how an event looks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Mark = Literal["progress", "begun", "done", "skipped"]


@dataclass(frozen=True)
class Event:
    """`step` of `total` in `stage` is done; `values` are figures worth showing (KL, ratio, tokens/s, …).

    `mark`: "begun", "done" and "skipped" are a stage of a run as a whole, and what is told between them is part of it;
    `record`: figures for the training curve alone, beside `values`; None for what is no step of a training.
    """

    stage: str
    step: int
    total: int
    values: Mapping[str, float | int | str] = field(default_factory=dict)
    mark: Mark = "progress"
    record: Mapping[str, float] | None = None


Notify = Callable[[Event], None]


def silent(event: Event) -> None:
    """Drop the event: the default of every `notify` argument."""
