"""A weight that is put together piece by piece while it is written: no second copy of a large tensor ever exists."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from soco_train.numbers.blocks import Levels

Array = np.ndarray[Any, np.dtype[Any]]
Order = Array | None
# Bytes that are put in order, cast and written at one time.
CHUNK = 1 << 22


class Stored(Protocol):
    """What an array is asked for here; one that lies in a file may make it anew each time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its axes."""

    @property
    def nbytes(self) -> int:
        """Bytes that all of it takes in memory."""

    def __len__(self) -> int:
        """Length of the first axis."""

    def __getitem__(self, index: Any) -> Array:
        """Return a part of it, or with [:] all of it."""


@dataclass(frozen=True)
class Part:
    """Rows of a Matrix: those of `array` [m, n], in the order `rows`; `levels`: as they are rounded, if known."""

    array: Stored
    rows: Order = None
    levels: Levels | None = None


@dataclass(frozen=True)
class Matrix:
    """Parts below each other, [m, n]; column i is the parts' column `columns[i]`."""

    parts: Sequence[Part]
    columns: Order = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return sum(len(part.array) for part in self.parts), self.parts[0].array.shape[1]

    def pieces(self, size: int | None = None) -> Iterator[Array]:
        """Yield the matrix from top to bottom, some rows of about `size` bytes (default: CHUNK) at a time."""
        step = _step(size, self.shape[1])
        for part in self.parts:
            for start in range(0, len(part.array), step):
                rows = slice(start, start + step) if part.rows is None else part.rows[start : start + step]
                piece = part.array[rows]
                yield piece if self.columns is None else piece[:, self.columns]

    def transposed(self) -> Iterator[Array]:
        """Yield the transpose [n, m] from top to bottom, some rows at a time."""
        (m, n), step = self.shape, _step(None, self.shape[0])
        for start in range(0, n, step):
            columns = slice(start, start + step) if self.columns is None else self.columns[start : start + step]
            rows, left = np.empty((min(step, n - start), m), np.float32), 0
            for part in self.parts:  # one after the other: of what lies in files only one is in memory
                taken = part.array[:, columns]
                rows[:, left : left + len(taken)] = (taken if part.rows is None else taken[part.rows]).T
                left += len(taken)
            yield rows


def _step(size: int | None, width: int) -> int:
    return max(1, (size or CHUNK) // (4 * max(1, width)))
