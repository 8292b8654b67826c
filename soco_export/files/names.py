"""Names of files, and attributes of nodes, that more than one room uses."""

from __future__ import annotations

from typing import Any

MODEL_FILE = "model.onnx"

# What makes ONNX Runtime's GroupQueryAttention keep integers of so many bits, with a scale for each number of a head.
ROUNDED_CACHE: dict[str, dict[str, Any]] = {
    kind: {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": bits}
    for kind, bits in {"int8": 8, "int4": 4}.items()
}
