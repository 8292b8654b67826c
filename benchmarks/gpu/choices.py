"""b as data: which cells in which order, how many tokens, which learning rates are tried.

0.6 comes first, where methods differ most for their tokens; at each size the closed forms, which cost seconds;
after the other sizes what more tokens, and other texts, give at 0.6.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Text = Literal["mixed", "carried", "sampled"]
PRICED = ("allocation=lagrangian",)
INT4 = ("refine.distill.rounding.weights=int4",)
# The probe trains with a tenth of the tokens at each rate; the one that is best on text nobody trains on is taken.
PROBE, PROBED = 0.1, "two-sided-distilled"
USUAL = 3e-4  # what SmolLM2 had with fewer tokens (docs/benchmarks.md)
# A few seconds of a model of 3 M parameters, for the tests.
SHORT = (
    *("data.blocks=16", "evaluation.blocks=2", "train.statistics_blocks=2", "train.fisher_blocks=2"),
    "layers.include=['*.layers.0.*']",
)


@dataclass(frozen=True)
class Effort:
    """How much is done. batch: tokens a step; sampled: (batches, sequences in each); block: tokens of a sequence.

    rates: Muon's learning rates that are tried, by size, the sizes in order of worth; dense_rates: of the dense model;
    held_out: last blocks of the carried text, on which rates are chosen; prompt: carried tokens a sample begins with;
    score_rate: train.lr for as many steps; settings: recipe keys of all cells.
    """

    block: int
    batch: int
    sampled: tuple[int, int]
    held_out: int
    prompt: int
    rates: Mapping[float, Sequence[float]]
    dense_rates: Sequence[float]
    score_rate: float = 0.01
    settings: tuple[str, ...] = ()


LARGE = Effort(
    block=512,
    batch=16384,
    sampled=(2, 1024),
    held_out=32,
    prompt=8,
    rates={0.6: (3e-4, 1e-3, 3e-3), 0.4: (3e-4, 1e-3, 3e-3), 0.8: (1e-4, 3e-4, 1e-3)},
    dense_rates=(1e-5, 3e-5, 1e-4),
)
SMALL = Effort(
    block=32,
    batch=128,
    sampled=(2, 4),
    held_out=2,
    prompt=4,
    rates={0.6: (3e-4, 1e-3)},
    dense_rates=(1e-5,),
    settings=SHORT,
)


@dataclass(frozen=True)
class Choice:
    """One cell: a method of recipes/methods at a size, with `effort` times the tokens and further recipe keys."""

    method: str
    keep: float
    remark: str = ""
    settings: tuple[str, ...] = ()
    effort: float = 1.0
    text: Text = "mixed"

    @property
    def title(self) -> str:
        """How the piece is called."""
        return f"{self.keep:g} {self.method}{f', {self.remark}' if self.remark else ''}"


def closed_forms(keep: float) -> Iterator[Choice]:
    """Yield what takes no training at one size."""
    yield Choice("svd-llm", keep)
    yield Choice("two-sided", keep)
    yield Choice("fisher", keep, "by price", PRICED)


def trained(keep: float) -> Iterator[Choice]:
    """Yield what is trained at one size: the control, the closed form's factors, learnt scores, factors for int4."""
    yield Choice("two-sided-distilled", keep)
    yield Choice("svd-llm-distilled", keep)
    yield Choice("soco-plus", keep)
    yield Choice("two-sided-distilled", keep, "for int4", INT4)
    yield Choice("fisher-distilled", keep, "by price", PRICED)


def further(keep: float) -> Iterator[Choice]:
    """Yield where more compute leads at one size, and what the text is worth."""
    for effort in (0.2, 4.0):
        yield Choice("two-sided-distilled", keep, f"{effort:g} × the tokens", effort=effort)
        yield Choice("soco-plus", keep, f"{effort:g} × the tokens", effort=effort)
    yield Choice("two-sided-distilled", keep, "carried text alone", text="carried")
    yield Choice("two-sided-distilled", keep, "sampled text alone", text="sampled")
