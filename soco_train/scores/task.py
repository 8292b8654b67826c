"""What a scorer works on, and what the training of scores or masks works on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from soco_train.events import Notify, silent
from soco_train.modules.subject import Subject
from soco_train.settings import PlanSettings, TrainSettings

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainingTask(Subject):
    """All that score training needs. tokens: [n, block] int64; start: s₀ by layer ([k] each) or None for s ≡ 1.

    `workdir` receives checkpoints; `fingerprint` names this exact task, a checkpoint of another one is ignored.
    """

    train: TrainSettings
    plan: PlanSettings
    workdir: Path
    notify: Notify
    fingerprint: str
    start: Mapping[str, torch.Tensor] | None = None


@dataclass(frozen=True)
class ScoringTask(Subject):
    """What a scorer works on: a dense model, its participating Linears, their spectra and calibration blocks [n, t]."""

    train: TrainSettings
    plan: PlanSettings
    workdir: Path
    notify: Notify = field(default=silent)
    data_fingerprint: str = ""


def sized(task: ScoringTask) -> ScoringTask:
    """Return the task at the size the scores are trained for."""
    if task.train.keep_params is None:
        return task
    return replace(task, plan=task.plan.model_copy(update={"keep_params": task.train.keep_params}))


def training(task: ScoringTask, start: Mapping[str, torch.Tensor] | None) -> TrainingTask:
    """Return what learns the scores of `task`; start: s₀ by layer, [k] each, or None for ones."""
    return TrainingTask(
        model=task.model,
        linears=task.linears,
        spectra=task.spectra,
        tokens=task.tokens,
        train=task.train,
        plan=task.plan,
        workdir=task.workdir,
        notify=task.notify,
        fingerprint=_fingerprint(task),
        start=start,
    )


def _fingerprint(task: ScoringTask) -> str:
    """Name this task: settings, plan, data and layers; a checkpoint of another task must not be continued."""
    shapes = {name: list(linear.weight.shape) for name, linear in task.linears.items()}
    settings = [
        task.train.model_dump(mode="json", exclude={"checkpoint_every"}),
        task.plan.model_dump(mode="json"),
        shapes,
    ]
    return hashlib.sha256(json.dumps([*settings, task.data_fingerprint], sort_keys=True).encode()).hexdigest()
