"""What the proof measures, as plain data: readable without PyTorch or ONNX Runtime."""

from __future__ import annotations

from dataclasses import dataclass

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
    """`value` = exp(`loss`); `loss`: mean negative log-likelihood in nats over the `tokens` scored."""

    value: float
    loss: float
    tokens: int


@dataclass(frozen=True)
class TaskFigures:
    """Accuracy of one model on one task. `acc_norm`: likelihood per byte of the choice; `stderr` is of `acc`."""

    items: int
    acc: float
    acc_norm: float
    stderr: float | None


@dataclass(frozen=True)
class TaskComparison:
    """Dense against compressed. `agreement`: same pick; `flips`: right ↔ wrong changed; `recovery`: acc ratio."""

    dense: TaskFigures
    compressed: TaskFigures
    agreement: float
    flips: float
    recovery: float | None
