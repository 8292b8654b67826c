"""What config.json says of the low-rank layers: the `quantization_config` by which transformers finds our loader."""

from __future__ import annotations

from typing import Any

QUANT_METHOD = "soco-export"
INSTALL = "pip install soco-export"
FORMAT = 1  # of the record in config.json and the tensor names that go with it


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
