"""The weights of a model's blocks that take no part in a plan, and what that makes of `keep_params`."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter

from soco_train.bounded import MADE_ANEW, answering

AS_WRITTEN = ConfigDict(strict=True, extra="forbid")  # of what plan.json holds: as it was written, and nothing else
HARDLY_VISITED = "the calibration text hardly visits this expert (fewer tokens than components)"
FEW = 0.5  # share of the blocks' weights below which keep_params says little about the model


@dataclass(frozen=True)
class LeftOut:
    """A weight that takes no part, and why; `stay`: how many of its numbers, where a refinement takes some."""

    __pydantic_config__: ClassVar = AS_WRITTEN
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=2, max_length=8)]
    reason: str
    stay: Annotated[int, Field(ge=1)] | None = None

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def dropped(self) -> int:
        """How many numbers it loses."""
        return 0 if self.stay is None else self.numbers - self.stay

    def record(self) -> list[Any]:
        """Return it as JSON has it, to be read as LeftOut(*record)."""
        return [list(self.shape), self.reason, *([] if self.stay is None else [self.stay])]


def few_numbers(stay: int, size: int) -> str:
    """Return what `refine.values` does to a projection of values."""
    return f"refine.values: {stay} of {size} numbers of each value head stay"


def read_left_out(records: Any) -> dict[str, LeftOut]:
    """Return what `LeftOut.record` wrote, by tensor name; DataError if it is something else."""

    def make() -> dict[str, LeftOut]:
        found = {name: asdict(LeftOut(*record)) for name, record in records.items()}
        return TypeAdapter(dict[str, LeftOut]).validate_json(json.dumps(found))

    made: dict[str, LeftOut] = answering("these are no weights that take no part", "left_out", MADE_ANEW, make)
    return made


def taking_part(selected: int, left_out: Mapping[str, LeftOut]) -> float:
    """Return the share of the blocks' weights that takes part; `selected`: how many numbers do."""
    return selected / (selected + sum(weight.numbers for weight in left_out.values()))


def notes(selected: int, left_out: Mapping[str, LeftOut], keep_params: float | None) -> Iterator[str]:
    """Yield what share of the blocks' weights takes part, then a line for each kind of weight that does not.

    keep_params: None where the plan is for bytes.
    """
    if not left_out:
        return
    share, total = taking_part(selected, left_out), selected + sum(weight.numbers for weight in left_out.values())
    removed = f": keep_params {keep_params:g} removes {(1 - keep_params) * share:.1%} of them" if keep_params else ""
    few = ", less than half" if share < FEW else ""
    yield f"{share:.1%} of the weights in the blocks take part{few}{removed}"
    kinds: dict[tuple[str, str], list[int]] = {}
    for name, weight in left_out.items():
        kinds.setdefault((re.sub(r"\.\d+(?=\.)", ".*", name), weight.reason), []).append(weight.numbers)
    for (pattern, reason), sizes in kinds.items():
        yield f"left out: {pattern} ({len(sizes)} tensors, {sum(sizes) / total:.1%} of the blocks): {reason}"
