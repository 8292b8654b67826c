"""What every step of training works on: the dense model, its layers that take part, and the calibration text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from soco_train.store.spectra import Spectrum


@dataclass(frozen=True)
class Subject:
    """A dense model, its participating Linears and their spectra by name, and calibration tokens [n, t] int64."""

    model: nn.Module
    linears: Mapping[str, nn.Linear]
    spectra: Mapping[str, Spectrum]
    tokens: torch.Tensor
