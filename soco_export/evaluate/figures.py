"""What the proof measures, as plain data: readable without PyTorch or ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

DENSE, LOW_RANK, SHIPPED = "dense", "low-rank", "shipped"  # the forms of a model that are asked, in this order


@dataclass(frozen=True)
class ParityFigures:
    """Distance of a candidate's logits from a reference's, over `positions` next-token distributions.

    KL(reference ‖ candidate) in nats; `token_agreement`: share of positions with the same most likely token.
    A NaN or +inf in either's logits makes KL and difference NaN, and its position a disagreement.
    """

    positions: int
    mean_kl: float
    max_kl: float
    max_logit_difference: float
    token_agreement: float


@dataclass(frozen=True)
class StepParity:
    """One step of the way, measured on a prefill and on cached decode steps.

    `greedy_agreement`: share of the reference's greedy tokens that the candidate generates before its first
    difference, mean over prompts; None if none were asked for.
    """

    prefill: ParityFigures
    decode: ParityFigures
    greedy_agreement: float | None = None


@dataclass(frozen=True)
class PerplexityFigures:
    """`value` = exp(`loss`); `loss`: mean negative log-likelihood in nats over the `tokens` scored.

    `blocks`: the mean loss of each block, in nats, in the text's order; `interval`: low and high end of the 95 %
    interval of `value`, as far as the text is a sample of its kind; None for a single block.
    """

    value: float
    loss: float
    tokens: int
    blocks: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> PerplexityFigures:
        """Return the figures that were written as JSON, which knows no tuples."""
        ends = found.get("interval")
        interval = None if ends is None else (float(ends[0]), float(ends[1]))
        return cls(found["value"], found["loss"], found["tokens"], tuple(found.get("blocks", ())), interval)


@dataclass(frozen=True)
class TaskFigures:
    """Accuracy of one model on one task, a share of 1; `stderr` is of `acc`.

    `acc`: by the likelihood of a choice; `acc_norm`: by likelihood per character; `acc_bytes`: per byte of UTF-8.
    """

    items: int
    acc: float
    acc_norm: float
    stderr: float | None
    acc_bytes: float | None = None


@dataclass(frozen=True)
class TaskComparison:
    """Dense against compressed on the same items. Shares of 1; intervals are at 95 %, from the items that changed.

    `agreement`: same pick, `kappa`: beyond chance (1 the same, 0 chance, None undefined); `flips`: right ↔ wrong,
    of them `lost` right → wrong and `gained` wrong → right; `recovery`: compressed.acc / dense.acc; `difference`:
    compressed.acc − dense.acc.
    """

    dense: TaskFigures
    compressed: TaskFigures
    agreement: float
    flips: float
    recovery: float | None
    lost: float | None = None
    gained: float | None = None
    kappa: float | None = None
    difference: float | None = None
    difference_interval: tuple[float, float] | None = None
    recovery_interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class Tokens:
    """Tokens of one kind: those whose property lies between `low` and `high`, both of them found.

    `dense`, `compressed`: their mean losses in nats; `interval`: 95 % of compressed − dense, over windows, None for
    a single window.
    """

    low: float
    high: float
    tokens: int
    dense: float
    compressed: float
    interval: tuple[float, float] | None = None

    @property
    def added(self) -> float:
        """The loss that was added, in nats a token."""
        return self.compressed - self.dense


@dataclass(frozen=True)
class DomainFigures:
    """Perplexity on one of the evaluation texts; `interval`: 95 % of `ratio` = compressed / dense."""

    tokens: int
    dense: float
    compressed: float
    ratio: float
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class GenerationFigures:
    """Greedy continuations of `tokens` tokens each, means over prompts.

    `kept`: tokens before the first that differs; `dense`, `compressed`: the share of 4-grams that repeat an earlier one
    of the same continuation; `repetition_increase`: compressed − dense.
    """

    prompts: int
    tokens: int
    kept: float
    dense: float
    compressed: float
    repetition_increase: float


@dataclass(frozen=True)
class ForgettingFigures:
    """Where the dense model's knowledge went: losses by kind of token, flips, calibration. Shares of 1, losses in nats.

    `lost`, `gained`: tokens whose likeliest token was right and is wrong, and the other way round; `agreement`: the
    same likeliest token; `ece_*`: expected calibration error of its probability. `frequency`: by how often the token
    occurs in the text, the rarest tenth first; `entropy`: by that of the dense model's prediction, where it is surest
    first; `position`: by place in the window. `rare_loss`: loss added on the rarest tenth.
    """

    tokens: int
    accuracy_dense: float
    accuracy_compressed: float
    lost: float
    gained: float
    agreement: float
    ece_dense: float
    ece_compressed: float
    ece_increase: float
    rare_loss: float
    frequency: tuple[Tokens, ...]
    entropy: tuple[Tokens, ...]
    position: tuple[Tokens, ...]
    domains: Mapping[str, DomainFigures]
    generation: GenerationFigures | None = None
