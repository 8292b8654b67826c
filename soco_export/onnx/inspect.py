"""What a finished ONNX folder holds: node counts, bytes, and the arithmetic of one token. Reads no weights."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

MODEL_FILE = "model.onnx"


@dataclass(frozen=True)
class GraphSummary:
    """`ops`: nodes by kind; `initializer_bytes`: all weights; `flops_per_token`: 2 · m · n over all weight products."""

    ops: dict[str, int]
    initializer_bytes: int
    flops_per_token: int


def summarise(folder: Path) -> GraphSummary:
    """Summarise `folder`/model.onnx without reading its weights."""
    graph = ir.load(folder / MODEL_FILE).graph
    ops = Counter(node.op_type for node in graph)
    tensors = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    return GraphSummary(
        ops=dict(sorted(ops.items())),
        initializer_bytes=sum(tensor.nbytes for tensor in tensors),
        flops_per_token=sum(_flops(node) for node in graph),
    )


def _flops(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return 2 * node.attributes["K"].as_int() * node.attributes["N"].as_int()
    if node.op_type not in ("MatMul", "Gemm"):
        return 0
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return 0
    return 2 * int(weight.const_value.size)
