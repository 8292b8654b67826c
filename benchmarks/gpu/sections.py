"""The sections in order of worth: what each is made of, and its part of the time.

A part is a process; it yields pieces, each a name and what measures it. Pieces come in order of worth too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.document import Figures
from benchmarks.gpu.options import Options

Piece = tuple[str, Callable[[], Figures]]
Pieces = Callable[[Options, str, TimeBox], Iterator[Piece]]
Line = Callable[[Mapping[str, Figures]], str]


class Skipped(Exception):
    """This machine has nothing for a part; the message says what is missing."""


@dataclass(frozen=True)
class Section:
    """`module` has `parts(options)`, `pieces(options, part, box)` and `row(figures)`; `weight` of the whole time."""

    letter: str
    title: str
    module: str
    weight: float

    def parts(self, options: Options) -> Sequence[str]:
        """Return the names of the processes, in order."""
        found: Sequence[str] = self._module().parts(options)
        return found

    def pieces(self, options: Options, part: str, box: TimeBox) -> Iterator[Piece]:
        """Yield what one process measures."""
        yield from self._module().pieces(options, part, box)

    def row(self, figures: Figures) -> str:
        """Say a piece in a few words."""
        if "error" in figures:
            return f"failed: {figures['error']}"
        return f"{self._module().row(figures)}{' (cut short)' if 'short' in figures else ''}"

    def _module(self):
        return import_module(f"benchmarks.gpu.{self.module}")


SECTIONS = (
    Section("a", "what is learnt on the GPU is what the CPU learns", "tests", 1),
    Section("b", "more tokens: perplexity by size and method", "language", 5),
    Section("c", "a 7B model's true sizes", "shapes", 4),
    Section("d", "ONNX Runtime on CUDA, PyTorch beside it", "runtime", 2),
)
