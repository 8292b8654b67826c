"""What every step of training is given beside its settings: what it works on, and where it works."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn

from soco_train.events import Notify, silent
from soco_train.modules.values import ValueSite
from soco_train.plan.left_out import LeftOut
from soco_train.store.spectra import Spectrum


@dataclass(frozen=True)
class Subject:
    """A dense model, its participating Linears and their spectra by name, and calibration tokens [n, t] int64.

    `left_out`: weights of its blocks that take no part, by tensor name; `narrowable`: attentions whose values the plan
    may give fewer numbers.
    """

    model: nn.Module
    linears: Mapping[str, nn.Linear]
    spectra: Mapping[str, Spectrum]
    tokens: torch.Tensor
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    narrowable: tuple[ValueSite, ...] = ()


@dataclass(frozen=True)
class Session:
    """Where a step keeps its checkpoints, what names its task, whom it tells, and the seed that orders its batches.

    A checkpoint in `workdir` of another `fingerprint` is not continued. `remember_in`: a folder of this dense model
    whose distillations share what it predicts; None: each keeps its own.
    """

    workdir: Path
    notify: Notify = silent
    fingerprint: str = ""
    seed: int = 0
    remember_in: Path | None = None

    def named(self, fingerprint: str) -> Session:
        """Return the same session for the task `fingerprint`."""
        return replace(self, fingerprint=fingerprint)
