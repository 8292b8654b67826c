"""SoCo's three phases as data: what is on at each step, and when a phase may end before its preset boundary.

    1 coarse compression   L_inc + λ L_dec towards a target that falls linearly from today's size to R
    2 oscillation          L_inc, and L_dec only while R̂ > R (1 + ε): over-pruned components come back
    3 polarisation         as 2, + λ_s L_sp with λ_s 0 → 1 and κ annealed; at the very end the support is frozen

Published: the phases and their losses. Ours: the shares, the falling target, the annealing, the stopping rules.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from soco_train.settings.train import TrainSettings

QUIET_STEPS = 20
STABLE_OVERLAP = 0.98
UNDECIDED = 0.005

HORIZON = 8  # steps that λ_d looks ahead: about the memory of Adam's momentum
TREND_RATE = 0.3
GAIN = 2.0
MAX_CHANGE = 0.15  # of log λ_d a step


@dataclass(frozen=True)
class Orders:
    """What the trainer does at one step."""

    phase: int
    target: float  # R_t: the size above which L_dec pushes
    polarise: float  # λ_s
    temperature: float  # κ
    frozen: bool  # the support no longer changes


@dataclass
class Timetable:
    """Boundaries in steps: `begins[i]` is the first step of `phases[i]`, `freeze` that of the frozen finish."""

    phases: list[int]
    begins: list[int]
    freeze: int
    steps: int

    @staticmethod
    def preset(settings: TrainSettings) -> Timetable:
        """Share the steps out as the recipe says; phases left out give their share to the others."""
        schedule = settings.schedule
        freeze = settings.steps - round(settings.steps * schedule.freeze)
        shares = [schedule.shares[number - 1] for number in schedule.phases]
        begins = [round(settings.steps * sum(shares[:i]) / sum(shares)) for i in range(len(shares))]
        return Timetable(list(schedule.phases), begins, freeze, settings.steps)

    def index(self, step: int) -> int:
        """Return which entry of `phases` `step` belongs to."""
        return max(i for i, begin in enumerate(self.begins) if begin <= step)

    def _end(self, at: int) -> int:
        """Return the step at which entry `at` of `phases` is over: the next begins or the support freezes."""
        return min([*self.begins[at + 1 : at + 2], self.freeze])

    def end_phase(self, step: int) -> None:
        """Let the phase of `step` end after it: everything later moves forward by what is saved."""
        at = self.index(step)
        saved = max(0, self._end(at) - step - 1)
        self.begins = [begin - saved if i > at else begin for i, begin in enumerate(self.begins)]
        self.freeze -= saved
        self.steps -= saved

    def orders(self, step: int, settings: TrainSettings, start_size: float, keep_params: float) -> Orders:
        """Return what is on at `step`; `start_size` is R̂ before the first step."""
        at = self.index(step)
        end = self._end(at)
        progress = min(1.0, (step - self.begins[at] + 1) / max(1, end - self.begins[at]))
        hot, cold = settings.temperature
        phase = self.phases[at]
        if phase == 1:
            fall = min(1.0, progress / settings.schedule.reach)
            target = start_size + (keep_params - start_size) * fall
        else:
            target = keep_params * (1 + settings.schedule.overshoot)
        annealing = progress if phase == 3 else 0.0
        return Orders(
            phase=phase,
            target=target,
            polarise=settings.polarise_weight * annealing,
            temperature=hot * (cold / hot) ** annealing,
            frozen=step >= self.freeze,
        )


@dataclass
class PressureController:
    """Moves λ_d so that R̂ follows its target; kept in checkpoints.

    Scores move long before the gates feel it, so it steers by where R̂ will be `HORIZON` steps on, not by where it is:
    without that λ_d winds up, and components that ought to differ die together.
    """

    log_weight: float = -1.0
    last: float = float("nan")
    trend: float = 0.0

    @property
    def weight(self) -> float:
        """λ_d."""
        return math.exp(self.log_weight)

    def observe(self, soft: float, target: float) -> float:
        """Take note of R̂ and return the relative excess over `target` that is coming; positive: push."""
        if not math.isnan(self.last):
            self.trend += TREND_RATE * (soft - self.last - self.trend)
        self.last = soft
        coming = (soft + HORIZON * self.trend) / target - 1.0
        change = max(-MAX_CHANGE, min(MAX_CHANGE, GAIN * coming))
        self.log_weight = max(-6.0, min(6.0, self.log_weight + change))
        return coming


@dataclass
class StoppingRules:
    """Ours, optional: end a phase once it has nothing left to decide. Kept in checkpoints."""

    quiet: int = 0
    ratios: list[float] = field(default_factory=list)
    peak: torch.Tensor | None = None

    def done(self, orders: Orders, ratio: float, limit: float, s: torch.Tensor, threshold: float) -> bool:
        """Return whether the phase may end after this step; `ratio`: the hard size, `limit`: R (1 + ε), s: [Σk]."""
        if orders.phase == 1:
            self.quiet = self.quiet + 1 if ratio <= limit else 0
            return self.quiet >= QUIET_STEPS
        if orders.phase == 2:
            return self._settled(ratio, s > threshold)
        undecided = ((s > 0.1 * threshold) & (s < threshold)).float().mean()
        return bool(undecided < UNDECIDED)

    def _settled(self, ratio: float, support: torch.Tensor) -> bool:
        """Return whether the support at this oscillation peak overlaps that at the last one (Jaccard)."""
        self.ratios = [*self.ratios[-2:], ratio]
        if len(self.ratios) < 3 or not self.ratios[0] < self.ratios[1] > self.ratios[2]:
            return False
        previous, self.peak = self.peak, support.clone()
        if previous is None:
            return False
        overlap = (previous & support).sum() / (previous | support).sum().clamp(min=1)
        return bool(overlap > STABLE_OVERLAP)

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint's header keeps (the peak's support is a tensor and is kept with the tensors)."""
        return {"quiet": self.quiet, "ratios": self.ratios}
