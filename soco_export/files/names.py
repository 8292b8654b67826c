"""Names of files, and attributes of nodes, that more than one room uses."""

from __future__ import annotations

from typing import Any

MODEL_FILE = "model.onnx"

# What makes the cache of ONNX Runtime's GroupQueryAttention int8, with a scale for each number of a head.
INT8_CACHE: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
