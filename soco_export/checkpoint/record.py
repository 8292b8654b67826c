"""What config.json says of the low-rank layers: the `quantization_config` by which transformers finds our loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from soco_train.errors import DataError
from soco_train.settings.rounding import BITS, BLOCKS, WeightType

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


def planned_types(config: Mapping[str, Any]) -> tuple[dict[str, WeightType], dict[str, int]]:
    """Return (types, inputs of a block) by layer as `record_types` wrote them; empty where it did not.

    DataError for anything else there.
    """
    record = config.get(PLAN_KEY) or {}
    weights, blocks = ((record.get(key) or {}) if isinstance(record, dict) else None for key in ("weights", "blocks"))
    if isinstance(weights, dict) and isinstance(blocks, dict) and _known(weights, blocks):
        return weights, blocks
    raise DataError(
        f"{PLAN_KEY} gives layers a type, same or {', '.join(BITS)}, in blocks of {', '.join(map(str, BLOCKS))}",
        fix="remove it, or copy the checkpoint again",
        where=f"config.json: {PLAN_KEY}",
    )


def _known(weights: Mapping[str, object], blocks: Mapping[str, object]) -> bool:
    return all(kind in ("same", *BITS) for kind in weights.values()) and all(size in BLOCKS for size in blocks.values())
