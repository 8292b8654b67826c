"""What one Linear costs on one device, measured, as data: times by form and rank, and the rank from which dense wins.

Pure: soco_export/bench/layer_timing.py measures, soco_export/run/plans/measured_plan.py keeps the file.

    {"conditions": {...}, "multiple": 32, "layers": {"1536x576": {"stacked": {"dense": [...], "ranks": [...], ...}}}}
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from soco_train.bounded import read_text
from soco_train.errors import DataError
from soco_train.plan.allocation import Limit
from soco_train.settings.plan import Storage

Shape = tuple[int, int]
DIGITS = 10  # a side of a matrix has fewer
_LARGEST_MULTIPLE = 1024  # far above any step of ranks that is measured
_MOST_BYTES = 8 << 20  # a hundred shapes in all forms at 20 ranks take a tenth
_FIX = "give another latency.profile, or delete this one: it is measured anew"
_NOISE = 0.03  # of a time, beyond which alignment is meant
_Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Conditions:
    """Everything that a time depends on but the shape and the rank; a profile serves no other conditions.

    `processor`: name of the CPU or GPU; `runtime`: version of ONNX Runtime; `blocks`: how quantised weights are made;
    `bias`: whether a pruned layer adds one; `tokens`: how many go through the layer at once, one workload for each;
    `timing`: the version of the measurement itself.
    """

    processor: str
    provider: str
    threads: int
    runtime: str
    dtype: str
    weights: str
    blocks: str
    bias: bool
    tokens: tuple[int, ...]
    timing: int = 1


@dataclass(frozen=True)
class FormTimes:
    """Microseconds of one shape, one for each workload: of the dense layer, and in times[i] at ranks[i] (ascending).

    All of one series, so that they may be compared.
    """

    dense: tuple[float, ...]
    ranks: tuple[int, ...]
    times: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Profile:
    """All that was measured under the same conditions: times by shape (m, n) and by form.

    `multiple`: ranks in between are no faster than the next one.
    """

    conditions: Conditions
    multiple: int
    layers: Mapping[Shape, Mapping[str, FormTimes]]

    def lacks(self, shapes: set[Shape], form: Storage) -> set[Shape]:
        """Return the shapes for which `form` was not measured."""
        return {shape for shape in shapes if form not in self.layers.get(shape, {})}

    def completed_by(self, other: Profile) -> Profile:
        """Return what both know, measured under the same conditions; where both do, `other` wins."""
        shapes = {**self.layers, **other.layers}
        layers = {shape: {**self.layers.get(shape, {}), **other.layers.get(shape, {})} for shape in shapes}
        return Profile(self.conditions, max(self.multiple, other.multiple), layers)

    def to_json(self) -> str:
        """Return the profile as text."""
        layers = {
            f"{m}x{n}": {form: asdict(times) for form, times in forms.items()} for (m, n), forms in self.layers.items()
        }
        document = {"conditions": asdict(self.conditions), "multiple": self.multiple, "layers": layers}
        return json.dumps(document, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Profile:
        """Read what `to_json` wrote; DataError if it is something else, or holds what no measurement gives."""
        try:
            found = _Stored.model_validate_json(text, strict=False)
            shapes = {name: _shape(name) for name in found.layers}
            layers = {shapes[name]: _checked(shapes[name], forms, found) for name, forms in found.layers.items()}
        except ValidationError as error:
            first = error.errors()[0]
            said = ": ".join(filter(None, (".".join(map(str, first["loc"]))[:100], first["msg"][:100])))
            raise DataError(f"this is no latency profile: {said}", fix=_FIX) from error
        except ValueError as error:
            raise DataError(f"this is no latency profile: {error}", fix=_FIX) from error
        return Profile(found.conditions, found.multiple, layers)

    @staticmethod
    def load(path: Path) -> Profile:
        """Read a profile's file; DataError if it is none, or cannot be read."""
        try:
            return Profile.from_json(read_text(path, _FIX, _MOST_BYTES))
        except DataError as error:
            raise DataError(error.message, fix=error.fix, where=str(path)) from error


class _Stored(BaseModel):
    """A profile as its file has it."""

    model_config = ConfigDict(extra="forbid")
    conditions: Conditions
    multiple: int = Field(ge=1, le=_LARGEST_MULTIPLE)
    layers: dict[str, dict[Storage, FormTimes]]


def _shape(name: str) -> Shape:
    m, by, n = name.partition("x")
    known = by and m.isdecimal() and n.isdecimal() and max(len(m), len(n)) < DIGITS and int(m) and int(n)
    if not known or name != f"{int(m)}x{int(n)}":  # two names of one shape would be two entries
        raise ValueError(f"{name[:40]!r} is no shape")
    return int(m), int(n)


def _checked(shape: Shape, forms: Mapping[Storage, FormTimes], found: _Stored) -> dict[str, FormTimes]:
    """Return the times of one shape; ValueError unless each has a time above 0 for each workload at ascending ranks.

    No rank is above the full one.
    """
    workloads = len(found.conditions.tokens)
    for name, form in forms.items():
        rows = (form.dense, *form.times)
        regular = len(form.times) == len(form.ranks) > 0 and all(len(row) == workloads for row in rows)
        rising = all(low < high for low, high in pairwise((0, *form.ranks, min(shape) + 1)))
        if not (regular and rising and all(0 < time < math.inf for row in rows for time in row)):
            place, each = f"layers.{shape[0]}x{shape[1]}.{name}", f"each of the {workloads} workloads"
            raise ValueError(f"{place} holds no times above 0 for {each}, dense and at ascending ranks of the shape")
    return {str(name): form for name, form in forms.items()}


def at_rank(form: FormTimes, rank: int) -> _Reals:
    """Return the microseconds at `rank`, one for each workload: linear between measured ranks, monotone in the rank.

    A larger rank never counts as faster than a smaller one: where a measurement says so, it is noise or alignment.
    """
    rising = np.maximum.accumulate(np.asarray(form.times, dtype=np.float64), axis=0)
    return np.array([np.interp(rank, form.ranks, column) for column in rising.T])


def dense_from(times: FormTimes, tokens: Sequence[int], ranks: range) -> Limit | None:
    """Return the first of `ranks` that is not faster than dense in every workload, None if all are."""
    for rank in ranks:
        for count, ours, dense in zip(tokens, at_rank(times, rank), times.dense, strict=True):
            if ours >= dense:
                shown = max(rank, times.ranks[0])  # nothing smaller was measured
                return Limit(rank, f"measured {_us(ours)} at rank {shown} against {_us(dense)} dense ({_count(count)})")
    return None


def limits(profile: Profile, shapes: Mapping[str, Shape], form: Storage, multiple: int) -> dict[str, Limit]:
    """Return, by layer, from which multiple of `multiple` on dense is at least as fast; layers without are left out."""
    found = {}
    for shape in set(shapes.values()):
        ranks = range(multiple, min(shape), multiple)
        found[shape] = dense_from(profile.layers[shape][form], profile.conditions.tokens, ranks)
    return {name: limit for name, shape in shapes.items() if (limit := found[shape]) is not None}


def liked_multiple(times: Mapping[int, float]) -> int:
    """Return the smallest step of ranks that the kernels do not punish, from the times just below an aligned `rank`.

    times[q] was measured at rank - q, a multiple of q and of nothing larger that was tried; times[0] at `rank`. A
    smaller rank should cost no more: where it does, beyond noise, its alignment is what costs. The largest step
    is never punished: what is slower there is the machine's doing, and a larger step would leave narrow layers no rank.
    """
    steps = sorted(step for step in times if step)
    slow = [step for step in steps[:-1] if times[step] > times[0] * (1 + _NOISE)]
    return min(step for step in steps if step > max(slow, default=0))


def _us(value: float) -> str:
    return f"{value:.0f} µs" if value >= 10 else f"{value:.1f} µs"


def _count(tokens: int) -> str:
    return "1 token" if tokens == 1 else f"{tokens} tokens"
