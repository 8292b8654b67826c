"""What the reports show beside results.json: the rank plan, training curves, sample texts, the command, a frontier.

All of it may be absent: a report of a results.json alone has its figures and no pictures of the training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from soco_train.plan.rank_plan import LayerPlan

Judgement = Literal["passed", "failed", "unsure", ""]  # of all gates of a point; "": it has none
OWN = "."  # the folder of the point that is the swept run itself


@dataclass(frozen=True)
class Sample:
    """What the dense and the exported model write, greedily, after the same prompt."""

    prompt: str
    dense: str
    compressed: str


@dataclass(frozen=True)
class FrontierPoint:
    """One point of a sweep: a size in one type of weights, or the dense model (`keep_params` None).

    `bytes_ratio`, `perplexity_ratio`: to the dense model in the run's own weights; `chosen`: the one that ships;
    `folder`: in the swept run; `bytes`: of the ONNX folder; `recovery`: of the worst task; `decode`: how many times
    faster than the dense model in the same weights; `decode_ms`: median milliseconds a token. None: not measured.
    """

    name: str
    bytes_ratio: float
    perplexity_ratio: float | None
    chosen: bool = False
    keep_params: float | None = None
    weights: str = "same"
    folder: str = OWN
    bytes: int = 0
    perplexity_interval: tuple[float, float] | None = None
    recovery: float | None = None
    decode: float | None = None
    decode_interval: tuple[float, float] | None = None
    decode_ms: float | None = None
    gates: Judgement = ""


@dataclass(frozen=True)
class Material:
    """`layers`: the rank plan; `curves`: rows of run/stages/curve.py; `command`: as it was typed."""

    layers: Mapping[str, LayerPlan] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    samples: Sequence[Sample] = ()
    command: str = ""
    frontier: Sequence[FrontierPoint] = ()
