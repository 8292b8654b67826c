"""What a step of training takes, in plain sizes: each scorer and rung says it of itself, the cost card adds up.

Pure: sizes of a dense model and settings in, bytes and FLOPs out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import repeat

from soco_train.forms.registry import find_form, rank_at
from soco_train.settings.data import DataSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
DENSE_BYTES = 4
DOUBLE_BYTES = 8


@dataclass(frozen=True)
class ValueShape:
    """One attention whose values get fewer numbers: `numbers` of `size` of each of `groups` heads, read by `heads`.

    inputs: of the projection of values; outputs: of the one that reads their mixtures.
    """

    groups: int
    heads: int
    size: int
    numbers: int
    inputs: int
    outputs: int

    @property
    def dropped(self) -> int:
        """Numbers that both projections lose."""
        return (self.size - self.numbers) * (self.groups * self.inputs + self.heads * self.outputs)

    @property
    def cached(self) -> tuple[int, int]:
        """Numbers of keys and values of a token: as the model is, and as it becomes."""
        return 2 * self.groups * self.size, self.groups * (self.size + self.numbers)


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a dense model that cost anything. linears: (m, n) of every participating layer.

    context: positions of the model, None if it says none. shares: of the tokens, how many go through each of the
    `linears` (an expert's: those that choose it); empty: all. idle: parameters that a token does not meet. values: of
    each attention that `refine.values` narrows. cached: numbers of keys and values a token, where they are known.
    """

    parameters: int
    embedding: int
    tied: bool
    hidden: int
    vocabulary: int
    blocks: int
    linears: tuple[tuple[int, int], ...]
    context: int | None = None
    shares: tuple[float, ...] = ()
    idle: int = 0
    values: tuple[ValueShape, ...] = ()
    cached: int = 0

    def met(self, sizes: Iterable[float]) -> int:
        """Return the sum of a size of each layer over those that a token goes through."""
        return int(sum(share * size for share, size in zip(self.shares or repeat(1.0), sizes, strict=False)))

    @property
    def dropped(self) -> int:
        """Parameters that go with the numbers of value heads."""
        return sum(value.dropped for value in self.values)

    @property
    def active(self) -> int:
        """Parameters that a token meets."""
        return self.parameters - self.idle

    @property
    def active_factors(self) -> int:
        """Parameters that a token meets with P and B in the place of the participating layers."""
        selected = self.met(m * n for m, n in self.linears)
        return self.met(min(m, n) * (m + n) for m, n in self.linears) + self.active - selected

    @property
    def largest(self) -> int:
        """Numbers of the largest weight."""
        return max(self.embedding, *(m * n for m, n in self.linears))

    @property
    def selected(self) -> int:
        """Parameters of the participating layers."""
        return sum(m * n for m, n in self.linears)

    @property
    def components(self) -> int:
        """Singular components, hence scores."""
        return sum(min(m, n) for m, n in self.linears)

    @property
    def full_factors(self) -> int:
        """Numbers in P and B of all components."""
        return sum(min(m, n) * (m + n) for m, n in self.linears)


@dataclass(frozen=True)
class Task:
    """What a recipe asks of the training half: the calibration text, and the settings of every step."""

    data: DataSettings
    train: TrainSettings
    plan: PlanSettings
    refine: RefineSettings
    trained: bool  # whether the scores are learnt


@dataclass(frozen=True)
class Cost:
    """What a step takes at its peak and in all.

    memory: bytes where it computes, the dense model among them; beside: bytes of the host while a GPU computes; flops:
    by the dtype they are done in; disk: bytes of what it leaves in the run folder, by what that is; phase: its name on
    the cost card, if not the step's.
    """

    memory: int = 0
    beside: int = 0
    flops: Mapping[str, float] = field(default_factory=dict)
    disk: Mapping[str, int] = field(default_factory=dict)
    phase: str = ""


# None: the step's computation is negligible. width: bytes of a weight of the dense model where the step computes
CostOf = Callable[[Task, ModelShape, int], Cost | None]


def free(task: Task, shape: ModelShape, width: int) -> Cost | None:
    """Return the cost of a step whose computation is negligible."""
    return None


def ranks(plan: PlanSettings, shape: ModelShape) -> list[float]:
    """Return the rank, not rounded, at which each layer has the plan's share of m n."""
    form = find_form(plan.storage)
    return [rank_at(form, plan.keep_params, m, n) for m, n in shape.linears]


def active_student(plan: PlanSettings, shape: ModelShape) -> int:
    """Return the parameters that a token meets with stacked factors in the place of the participating layers."""
    pairs = zip(ranks(plan, shape), shape.linears, strict=True)
    return shape.met(r * (m + n) - m * n for r, (m, n) in pairs) + shape.active


def stacked(plan: PlanSettings, shape: ModelShape) -> int:
    """Return the numbers of all factors as they are trained: stacked, whatever the storage."""
    return int(sum(r * (m + n) for r, (m, n) in zip(ranks(plan, shape), shape.linears, strict=True)))


def saved_by_the_rest(shape: ModelShape, width: int) -> int:
    """Return the bytes a token leaves for the backward pass, Linears apart: in fp32 the norms."""
    norms = 2 * shape.hidden * shape.blocks
    return DENSE_BYTES * norms + width * (shape.met(m for m, _ in shape.linears) + 3 * norms)


def activations(saved: int, shape: ModelShape, width: int, checkpointed: bool) -> int:
    """Return the bytes a token holds; checkpointed: the input of each block, and one block whole."""
    if not checkpointed:
        return saved
    return width * shape.hidden * shape.blocks + saved // shape.blocks


def logits(tokens: int, shape: ModelShape, chunk: int, width: int) -> int:
    """Return the bytes of student, teacher and gradient for all tokens, five fp32 tables for a chunk of them."""
    return shape.vocabulary * (3 * width * tokens + 5 * DENSE_BYTES * min(tokens, chunk))
