"""What config.json says of the low-rank layers: the `quantization_config` by which transformers finds our loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soco_train.errors import DataError
from soco_train.settings import BITS, WeightType

QUANT_METHOD = "soco-export"
INSTALL = "pip install soco-export"
FORMAT = 1  # of the record in config.json and the tensor names that go with it
PLAN_KEY = "soco_export"  # of config.json: what an export is to know of the plan


def quantization_record(layers: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the `quantization_config` of a checkpoint with these `layers`: name → kind, rank, bias."""
    kinds = {str(layer["kind"]) for layer in layers.values()}
    return {
        "quant_method": QUANT_METHOD,
        "install": INSTALL,
        "format": FORMAT,
        "storage": kinds.pop() if len(kinds) == 1 else "mixed",
        "layers": layers,
    }


def planned_weights(config: Mapping[str, Any]) -> dict[str, WeightType]:
    """Return what `record_weights` wrote; empty where it did not; DataError for anything else there."""
    record = config.get(PLAN_KEY) or {}
    weights = record.get("weights", {}) if isinstance(record, dict) else None
    if not isinstance(weights, dict) or not set(weights.values()) <= {"same", *BITS}:
        raise DataError(
            f"{PLAN_KEY} must give layers a type: same or {', '.join(BITS)}",
            fix="remove it, or copy the checkpoint again",
            where=f"config.json: {PLAN_KEY}",
        )
    return weights
