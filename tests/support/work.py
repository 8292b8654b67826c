"""What the scorers are given, as one value: `train_scores(*work)`."""

from __future__ import annotations

from typing import NamedTuple

from soco_train.modules.subject import Session, Subject
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import TrainSettings


class Work(NamedTuple):
    """A subject with its settings and session."""

    subject: Subject
    train: TrainSettings
    plan: PlanSettings
    session: Session
