"""What the reports show beside results.json: the rank plan, training curves, sample texts, the command, a frontier.

All of it may be absent: a report of a results.json alone has its figures and no pictures of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soco_train.plan.ranks import LayerPlan


@dataclass(frozen=True)
class Sample:
    """What the dense and the shipped model write, greedily, after the same prompt."""

    prompt: str
    dense: str
    compressed: str


@dataclass(frozen=True)
class FrontierPoint:
    """One size of a sweep. `bytes_ratio`, `perplexity_ratio`: to the dense model; `chosen`: the one that ships."""

    name: str
    bytes_ratio: float
    perplexity_ratio: float
    chosen: bool = False


@dataclass(frozen=True)
class Material:
    """`layers`: the rank plan; `curves`: rows of files/curve.py; `command`: as it was typed."""

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()
    command: str = ""
    frontier: Sequence[FrontierPoint] = ()
