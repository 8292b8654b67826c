"""The MLP of a layer."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Mlp
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.write.graph import Graph

_ACTIVATIONS = {"relu": ("Relu", {}), "gelu": ("Gelu", {}), "gelu_tanh": ("Gelu", {"approximate": "tanh"})}


# gated:  h ─┬─ gate ── activation ─┬─ Mul ── down        plain:  h ── in ── activation ── out
#            └─ up ─────────────────┘
# fused:  h ── gate above up ── Split ─┬─ activation ─┬─ Mul ── down
#                                      └──────────────┘
# Between in and out everything is elementwise: a pivoted layer's order is undone in the columns of `out`.
def emit_mlp(linears: Linears, mlp: Mlp, hidden: ir.Value, prefix: str) -> tuple[ir.Value, ir.Value | None]:
    """Return the output [batch, sequence, hidden] without the last bias, and that bias [hidden] or None."""
    graph, names = linears.graph, [f"{prefix}.{name}" for name in mlp.inputs]
    fused = mlp.gated and len(names) == 1
    order = None if fused else linears.native_order(names)
    parts: Sequence[ir.Value] = linears.many(hidden, names, rows=[order] * len(names))
    if fused:
        parts = graph.ops("Split", parts[0], graph.constant([mlp.inner] * 2), outputs=2, axis=-1)
    inner = clamped(graph, parts, *mlp.clamp) if mlp.clamp else activated(graph, parts[0], mlp.activation)
    if mlp.gated and not mlp.clamp:
        inner = graph.op("Mul", inner, parts[1])
    return linears.apart(inner, f"{prefix}.{mlp.output}", columns=order)


# gate ── Min limit ─┬─ Mul α ── Sigmoid ─┬─ Mul ─┐
#                    └────────────────────┘       ├─ Mul
# up ── Clip ± limit ── Add 1 ────────────────────┘
def clamped(graph: Graph, parts: Sequence[ir.Value], alpha: float, limit: float) -> ir.Value:
    """Return what gate and up make together in gpt-oss."""
    low, high, one, slope = (graph.constant(value, graph.dtype) for value in (-limit, limit, 1.0, alpha))
    gate, up = graph.op("Min", parts[0], high), graph.op("Clip", parts[1], low, high)
    glu = graph.op("Mul", gate, graph.op("Sigmoid", graph.op("Mul", gate, slope)))
    return graph.op("Mul", graph.op("Add", up, one), glu)


# silu: x ─┬─ Sigmoid ─┬─ Mul        relu2: x ── Relu ─┬─ Mul
#          └───────────┘                               └──┘
def activated(graph: Graph, x: ir.Value, activation: str) -> ir.Value:
    """Apply an activation."""
    if activation == "silu":
        return graph.op("Mul", x, graph.op("Sigmoid", x))
    if activation == "relu2":
        positive = graph.op("Relu", x)
        return graph.op("Mul", positive, positive)
    op, attributes = _ACTIVATIONS[activation]
    return graph.op(op, x, **attributes)
