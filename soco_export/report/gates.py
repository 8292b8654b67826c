"""Thresholds → verdicts, purely: measured figures in, judgements out, nothing rounded before it is compared.

A gate whose figure is missing or NaN fails, and says so: a check that could not be made has not been passed. A figure
with an interval (a speed-up) is judged by the interval: all of it on the right side passes, all of it on the wrong side
fails, and one that contains the threshold is inconclusive: another run of the same might say either.
A new gate is one field of `GateSettings` and one line of `GATES`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Literal

from pydantic import Field

from soco_export.files.text import exact
from soco_train.settings.section import Section

_Share = Annotated[float, Field(ge=0, le=1)]
Loss = Annotated[float, Field(ge=0)]
Precision = Literal["float32", "float16", "bfloat16", "int8", "int4", "int2"]


class GateSettings(Section):
    """A recipe's thresholds; None: that gate is not judged. KL in nats; ratios are compressed / dense.

    What an export may lose depends on what it rounds to: those thresholds are one number, or one by precision
    (`{float32: 1e-4, int8: 0.01}`; a precision that is not named is not judged). Speed-ups are dense time /
    compressed time, judged by their intervals, so that noise alone neither fails nor passes them.
    """

    max_export_kl: Loss | dict[Precision, Loss] | None = Field(
        default=None, description="mean KL(low-rank ‖ ONNX), prefill and decode"
    )
    max_logit_difference: Loss | dict[Precision, Loss] | None = Field(
        default=None, description="max |Δlogit|, low-rank to ONNX"
    )
    min_token_agreement: _Share | dict[Precision, _Share] | None = Field(
        default=None, description="top-1 agreement, low-rank to ONNX"
    )
    min_greedy_agreement: _Share | dict[Precision, _Share] | None = Field(
        default=None, description="greedy tokens kept by the export"
    )
    max_compression_kl: float | None = Field(default=None, ge=0, description="mean KL(dense ‖ low-rank)")
    max_ppl_ratio: float | None = Field(default=None, gt=0, description="perplexity of what ships / dense")
    min_task_recovery: float | None = Field(
        default=None, ge=0, description="accuracy of what ships / dense, worst task"
    )
    max_domain_ratio: float | None = Field(
        default=None, gt=0, description="perplexity of what ships / dense, worst of the evaluation texts"
    )
    max_rare_loss: float | None = Field(default=None, description="nats added on the rarest tenth of the tokens")
    max_lost_tokens: float | None = Field(
        default=None, ge=0, description="next tokens that were right and are wrong, a share of 1"
    )
    max_ece_increase: float | None = Field(
        default=None, ge=0, description="growth of the expected calibration error, a share of 1"
    )
    max_repetition_increase: float | None = Field(
        default=None, ge=0, description="growth of the share of 4-grams that repeat in greedy text"
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
    """`figures` are dotted names in the results (globs where names vary); the worst of them is judged.

    One that ends in ".value" and has ".low" and ".high" beside it is judged by that interval.
    """

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
    Gate("max_domain_ratio", ("forgetting.domains.*.ratio",), at_most=True),
    Gate("max_rare_loss", ("forgetting.rare_loss",), at_most=True),
    Gate("max_lost_tokens", ("forgetting.lost",), at_most=True),
    Gate("max_ece_increase", ("forgetting.ece_increase",), at_most=True),
    Gate("max_repetition_increase", ("forgetting.generation.repetition_increase",), at_most=True),
    Gate("max_bytes_ratio", ("sizes.bytes_ratio",), at_most=True),
    Gate("max_memory_ratio", ("memory.ratio",), at_most=True),
    Gate("min_decode_speedup", ("latency.workloads.decode*.speedup.value",), at_most=False),
    Gate("min_prefill_speedup", ("latency.workloads.prefill*.speedup.value",), at_most=False),
)


State = Literal["passed", "inconclusive", "failed"]
WORSE: tuple[State, ...] = ("passed", "inconclusive", "failed")


@dataclass(frozen=True)
class Verdict:
    """One gate's judgement. `figure`: what was measured (None: nothing was), under the name `source` in the results.

    `inconclusive`: neither passed nor failed, for `interval`, the figure's, contains the threshold.
    """

    name: str
    source: str
    figure: float | None
    threshold: float
    passed: bool
    message: str
    interval: tuple[float, float] | None = None
    inconclusive: bool = False

    @property
    def state(self) -> State:
        """Which of the three judgements it is."""
        return "passed" if self.passed else "inconclusive" if self.inconclusive else "failed"


@dataclass(frozen=True)
class _Reading:
    name: str
    value: float
    ends: tuple[float, float] | None


def judge(figures: Mapping[str, float | None], gates: GateSettings) -> tuple[Verdict, ...]:
    """Judge every gate that has a threshold. `figures`: dotted name → number, as `Results.figures()` gives them."""
    thresholds = gates.model_dump()
    return tuple(_judge(gate, thresholds[gate.key], figures) for gate in GATES if thresholds[gate.key] is not None)


def _judge(gate: Gate, threshold: float, figures: Mapping[str, float | None]) -> Verdict:
    found: list[_Reading] = []
    for pattern in gate.figures:
        matches = [(name, value) for name, value in figures.items() if fnmatchcase(name, pattern)]
        missing = next((name for name, value in matches if value is None), None if matches else pattern)
        if missing is not None:
            return Verdict(gate.key, missing, None, threshold, False, f"{missing} was not measured")
        found += [_Reading(name, value, _ends(name, figures)) for name, value in matches if value is not None]
    states = {reading.name: _state(reading, threshold, gate.at_most) for reading in found}
    worst = max(found, key=lambda one: (WORSE.index(states[one.name]), _badness(one.value, gate.at_most)))
    state = states[worst.name]
    return Verdict(
        name=gate.key,
        source=worst.name,
        figure=worst.value,
        threshold=threshold,
        passed=state == "passed",
        message=_message(gate, worst, threshold, state),
        interval=worst.ends,
        inconclusive=state == "inconclusive",
    )


def _ends(name: str, figures: Mapping[str, float | None]) -> tuple[float, float] | None:
    stem = name.removesuffix(".value")
    low, high = figures.get(f"{stem}.low"), figures.get(f"{stem}.high")
    return None if stem == name or low is None or high is None else (low, high)


def _state(reading: _Reading, threshold: float, at_most: bool) -> State:
    """Judge one figure: by the better and the worse end of its interval, which are one number if it has none."""
    better, worse = sorted(_badness(end, at_most) for end in reading.ends or (reading.value, reading.value))
    limit = _badness(threshold, at_most)
    if math.isnan(reading.value) or better > limit:
        return "failed"
    return "passed" if worse <= limit else "inconclusive"


def _badness(figure: float, at_most: bool) -> float:
    if math.isnan(figure):
        return math.inf
    return figure if at_most else -figure


def _message(gate: Gate, reading: _Reading, threshold: float, state: State) -> str:
    figure, source = reading.value, reading.name
    shown, limit = exact(figure), exact(threshold)
    if shown == limit and figure != threshold:
        shown, limit = repr(figure), repr(threshold)
    if math.isnan(figure):
        return f"{source} is NaN, no number to hold against {limit}"
    if reading.ends:
        shown += f" ({reading.ends[0]:.4g} … {reading.ends[1]:.4g})"
    wanted = "at most" if gate.at_most else "at least"
    if state == "inconclusive":
        return f"{source} is {shown}, too uncertain to say whether it is {wanted} {limit}"
    return f"{source} is {shown}, {wanted if state == 'passed' else 'above' if gate.at_most else 'below'} {limit}"
