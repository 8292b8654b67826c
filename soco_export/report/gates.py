"""Thresholds → verdicts, purely: measured figures in, yes or no out, nothing rounded before it is compared.

A gate whose figure is missing or NaN fails, and says so: a check that could not be made has not been passed.
A new gate is one field of `GateSettings` and one line of `GATES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from soco_train.settings import Section

Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=0)]
Precision = Literal["float32", "float16", "bfloat16", "int8", "int4"]


class GateSettings(Section):
    """A recipe's thresholds; None: that gate is not judged. KL in nats; ratios are compressed / dense.

    What an export may lose depends on what it rounds to: those thresholds are one number, or one by precision
    (`{float32: 1e-4, int8: 0.01}`; a precision that is not named is not judged). Speed-ups are dense time /
    compressed time. Off by default: machines shared by CI jobs are too noisy to judge.
    """

    max_export_kl: Loss | dict[Precision, Loss] | None = Field(
        default=None, description="mean KL(low-rank ‖ ONNX), prefill and decode"
    )
    max_logit_difference: Loss | dict[Precision, Loss] | None = Field(
        default=None, description="max |Δlogit|, low-rank to ONNX"
    )
    min_token_agreement: Share | dict[Precision, Share] | None = Field(
        default=None, description="top-1 agreement, low-rank to ONNX"
    )
    min_greedy_agreement: Share | dict[Precision, Share] | None = Field(
        default=None, description="greedy tokens kept by the export"
    )
    max_compression_kl: float | None = Field(default=None, ge=0, description="mean KL(dense ‖ low-rank)")
    max_ppl_ratio: float | None = Field(default=None, gt=0, description="perplexity of what ships / dense")
    min_task_recovery: float | None = Field(
        default=None, ge=0, description="accuracy of what ships / dense, worst task"
    )
    max_bytes_ratio: float | None = Field(default=None, gt=0, description="bytes on disk of what ships / dense")
    max_memory_ratio: float | None = Field(default=None, gt=0, description="peak memory of what ships / dense")
    min_decode_speedup: float | None = Field(default=None, gt=0)
    min_prefill_speedup: float | None = Field(default=None, gt=0, description="worst over the prompt lengths")

    def at(self, dtype: str, weights: str) -> GateSettings:
        """Return the thresholds of one export: its rounded `weights` decide, or its `dtype` where they are `same`."""
        precision = dtype if weights == "same" else weights
        chosen = {key: value.get(precision) for key, value in self if isinstance(value, dict)}
        return self.model_copy(update=chosen)


@dataclass(frozen=True)
class Gate:
    """`figures` are dotted names in the results (globs where names vary); the worst of them is judged."""

    key: str
    figures: tuple[str, ...]
    at_most: bool


GATES = (
    Gate("max_export_kl", ("parity.export.prefill.mean_kl", "parity.export.decode.mean_kl"), at_most=True),
    Gate(
        "max_logit_difference",
        ("parity.export.prefill.max_logit_difference", "parity.export.decode.max_logit_difference"),
        at_most=True,
    ),
    Gate(
        "min_token_agreement",
        ("parity.export.prefill.token_agreement", "parity.export.decode.token_agreement"),
        at_most=False,
    ),
    Gate("min_greedy_agreement", ("parity.export.greedy_agreement",), at_most=False),
    Gate(
        "max_compression_kl", ("parity.compression.prefill.mean_kl", "parity.compression.decode.mean_kl"), at_most=True
    ),
    Gate("max_ppl_ratio", ("perplexity.ratio",), at_most=True),
    Gate("min_task_recovery", ("tasks.*.recovery",), at_most=False),
    Gate("max_bytes_ratio", ("sizes.bytes_ratio",), at_most=True),
    Gate("max_memory_ratio", ("memory.ratio",), at_most=True),
    Gate("min_decode_speedup", ("latency.workloads.decode*.speedup.value",), at_most=False),
    Gate("min_prefill_speedup", ("latency.workloads.prefill*.speedup.value",), at_most=False),
)


@dataclass(frozen=True)
class Verdict:
    """One gate's judgement. `figure`: what was measured (None: nothing was), under the name `source` in the results."""

    name: str
    source: str
    figure: float | None
    threshold: float
    passed: bool
    message: str


def judge(figures: Mapping[str, float | None], gates: GateSettings) -> tuple[Verdict, ...]:
    """Judge every gate that has a threshold, by one precision's numbers (`GateSettings.at`).

    figures: dotted name → number, as `Results.figures()` gives them.
    """
    thresholds = gates.model_dump()
    return tuple(_judge(gate, thresholds[gate.key], figures) for gate in GATES if thresholds[gate.key] is not None)


def _judge(gate: Gate, threshold: float, figures: Mapping[str, float | None]) -> Verdict:
    found: list[tuple[str, float]] = []
    for pattern in gate.figures:
        matches = [(name, value) for name, value in figures.items() if fnmatchcase(name, pattern)]
        missing = next((name for name, value in matches if value is None), None if matches else pattern)
        if missing is not None:
            return Verdict(gate.key, missing, None, threshold, False, f"{missing} was not measured")
        found += [(name, value) for name, value in matches if value is not None]
    source, figure = max(found, key=lambda pair: _badness(pair[1], gate.at_most))
    passed = figure <= threshold if gate.at_most else figure >= threshold  # False for NaN
    return Verdict(gate.key, source, figure, threshold, passed, _message(gate, source, figure, threshold, passed))


def _badness(figure: float, at_most: bool) -> float:
    if math.isnan(figure):
        return math.inf
    return figure if at_most else -figure


def _message(gate: Gate, source: str, figure: float, threshold: float, passed: bool) -> str:
    shown, limit = f"{figure:.6g}", f"{threshold:.6g}"
    if shown == limit and figure != threshold:
        shown, limit = repr(figure), repr(threshold)
    side = ("at most" if gate.at_most else "at least") if passed else ("above" if gate.at_most else "below")
    if math.isnan(figure):
        return f"{source} is NaN, no number to hold against {limit}"
    return f"{source} is {shown}, {side} {limit}"
