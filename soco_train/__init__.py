"""Learns which singular components of a model's linear layers matter, and turns a parameter budget into factors.

Text becomes token blocks, blocks become statistics, weights become spectra, training gives each component a score, a
plan gives each layer a rank, and what leaves is the factors. Nothing here knows of ONNX or of the command line.
Importing it is light; the names below are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from soco_train.api import cut_factors, learn_scores
    from soco_train.data.corpus import load_blocks
    from soco_train.plan.ranks import plan_ranks
    from soco_train.settings.data import DataSettings, LayerSettings
    from soco_train.settings.plan import PlanSettings
    from soco_train.settings.refine import RefineSettings
    from soco_train.settings.train import TrainSettings

__all__ = [
    "DataSettings",
    "LayerSettings",
    "PlanSettings",
    "RefineSettings",
    "TrainSettings",
    "cut_factors",
    "learn_scores",
    "load_blocks",
    "plan_ranks",
]

_HOMES = {
    "DataSettings": "settings.data",
    "LayerSettings": "settings.data",
    "PlanSettings": "settings.plan",
    "RefineSettings": "settings.refine",
    "TrainSettings": "settings.train",
    "cut_factors": "api",
    "learn_scores": "api",
    "load_blocks": "data.corpus",
    "plan_ranks": "plan.ranks",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
