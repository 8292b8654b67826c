"""A mixture of experts in plain operators: each expert computes the tokens that chose it, and no others.

hidden [b,s,n] ── Reshape [1,tokens,n] ─┬─ router ── scores ── TopK ── weights [tokens,experts], 0 where not chosen
                                        └─ for each expert: NonZero ── Gather ── MLP ── Mul weight ── ScatterND add

An expert that no token chose multiplies matrices of no rows, which reads no weights. Experts may have any form and any
type of weight, since each is an MLP as any other.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from soco_export.onnx.describe.architecture import Experts
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.emit.mlp import emit_mlp
from soco_export.onnx.write.graph import Graph
from soco_export.onnx.write.matrix import Matrix, Part

_FLOAT = ir.DataType.FLOAT


def emit_experts(linears: Linears, experts: Experts, hidden: ir.Value, prefix: str) -> ir.Value:
    """Return the weighted sum of the chosen experts' outputs, [batch, sequence, hidden]."""
    graph = linears.graph
    with graph.scope("experts"):
        size = graph.op("Shape", hidden)
        width = graph.op("Slice", size, graph.constant([2]), graph.constant([3]))
        tokens = graph.op("Reshape", hidden, graph.op("Concat", graph.constant([1, -1]), width, axis=0))
        weights = _weights(linears, experts, tokens, prefix)
        flat = graph.op("Squeeze", tokens, graph.constant([0]))
        total = _cast(graph, graph.op("Mul", flat, graph.constant(0.0, graph.dtype)), _FLOAT)
        for expert in range(experts.count):
            total = _add(linears, experts, expert, (tokens, weights, total), prefix)
        total = _cast(graph, graph.op("Reshape", total, size), graph.dtype)
    if experts.shared is None:
        return total
    return graph.op("Add", total, _shared(linears, experts, hidden, prefix))


# tokens ── MatMul router ── Softmax or Sigmoid ─┬─(Add correction)── TopK ── indices ─┐
#                                                └──────────────── GatherElements ─────┴─(normalise)── ScatterElements
def _weights(linears: Linears, experts: Experts, tokens: ir.Value, prefix: str) -> ir.Value:
    """Return how much each expert counts for each token, float32 [tokens, experts]."""
    graph = linears.graph
    logits = _cast(graph, _product(linears, tokens, f"{prefix}.{experts.router}"), _FLOAT)
    logits = graph.op("Squeeze", logits, graph.constant([0]))
    if experts.scoring == "sparsemixer":
        return _one_by_one(graph, logits, experts.jitter)
    softmax = experts.scoring == "softmax"
    scores = graph.op("Softmax", logits, axis=-1) if softmax else graph.op("Sigmoid", logits)
    choice = scores
    if experts.correction is not None:
        name = f"{prefix}.{experts.correction}"
        choice = graph.op("Add", scores, graph.stored(name, np.asarray(linears.source.read(name)[:], np.float32)))
    _, chosen = graph.ops("TopK", choice, graph.constant([experts.chosen]), outputs=2, axis=-1)
    found = graph.op("GatherElements", scores, chosen, axis=1)
    if experts.normalised:
        found = graph.op("Div", found, graph.op("ReduceSum", found, graph.constant([1]), keepdims=1))
    if experts.scale != 1:
        found = graph.op("Mul", found, graph.constant(experts.scale, _FLOAT))
    nothing = graph.op("Mul", scores, graph.constant(0.0, _FLOAT))
    return graph.op("ScatterElements", nothing, chosen, found, axis=1)


# scores ─┬─ best ─┬─ those far below it: -∞ ── Softmax ── its weight
#         └────────┴─ without the best: the same again
def _one_by_one(graph: Graph, scores: ir.Value, jitter: float) -> ir.Value:
    """Return the weights of sparsemixer (arXiv 2409.12136) at inference, float32 [tokens, experts]."""
    axis, nowhere = graph.constant([1]), graph.constant(float("-inf"), _FLOAT)
    size, near = graph.op("Abs", scores), graph.constant(2 * jitter, _FLOAT)
    total, rest = graph.op("Mul", scores, graph.constant(0.0, _FLOAT)), scores
    for _ in range(2):
        best, chosen = graph.op("ReduceMax", rest, axis, keepdims=1), graph.op("ArgMax", rest, axis=1, keepdims=1)
        below = graph.op("Div", graph.op("Sub", best, scores), graph.op("Max", size, best))
        kept = graph.op("Where", graph.op("Greater", below, near), nowhere, rest)
        weight = graph.op("GatherElements", graph.op("Softmax", kept, axis=-1), chosen, axis=1)
        total = graph.op("ScatterElements", total, chosen, weight, axis=1)
        gone = graph.op("Add", graph.op("Mul", best, graph.constant(0.0, _FLOAT)), nowhere)
        rest = graph.op("ScatterElements", rest, chosen, gone, axis=1)
    return total


# weights ── Gather column ── NonZero ─┬─ Gather tokens ── MLP ── Mul weights ── ScatterND add ── total
#                                      └─────────────────────────────────────────────┘
def _add(
    linears: Linears, experts: Experts, expert: int, state: tuple[ir.Value, ir.Value, ir.Value], prefix: str
) -> ir.Value:
    graph, (tokens, weights, total) = linears.graph, state
    name = experts.name.format(expert)
    with graph.scope(name):
        column = graph.op("Gather", weights, graph.constant(expert), axis=1)
        places = graph.op("NonZero", column)
        rows = graph.op("Squeeze", places, graph.constant([0]))
        taken = graph.op("Gather", tokens, rows, axis=1)
        output, bias = emit_mlp(linears, experts.each, taken, f"{prefix}.{name}")
        output = output if bias is None else graph.op("Add", output, bias)
        weight = graph.op("Unsqueeze", graph.op("Gather", column, rows), graph.constant([1]))
        added = graph.op("Mul", _cast(graph, graph.op("Squeeze", output, graph.constant([0])), _FLOAT), weight)
        indices = graph.op("Unsqueeze", rows, graph.constant([1]))
        return graph.op("ScatterND", total, indices, added, reduction="add")


# hidden ─┬─ MLP ─────────────────── Mul ── y
#         └─(MatMul gate ── Sigmoid)──┘
def _shared(linears: Linears, experts: Experts, hidden: ir.Value, prefix: str) -> ir.Value:
    graph = linears.graph
    assert experts.shared is not None
    output, bias = emit_mlp(linears, experts.shared, hidden, prefix)
    output = output if bias is None else graph.op("Add", output, bias)
    if experts.shared_gate is None:
        return output
    gate = graph.op("Sigmoid", _product(linears, hidden, f"{prefix}.{experts.shared_gate}"))
    return graph.op("Mul", output, gate)


def _cast(graph: Graph, x: ir.Value, dtype: ir.DataType) -> ir.Value:
    """Sums over experts are made in float32: ONNX Runtime's CPU adds nothing else into rows."""
    return x if graph.dtype == _FLOAT else graph.op("Cast", x, to=dtype)


def _product(linears: Linears, x: ir.Value, name: str) -> ir.Value:
    """Return a small projection in floats, whatever the weights' type: which expert computes hangs on it."""
    graph = linears.graph
    stored = f"{name}.weight"
    y = graph.op("MatMul", x, graph.transposed(stored, Matrix([Part(linears.source.read(stored))])))
    bias = linears.bias(name, None)
    return y if bias is None else graph.op("Add", y, bias)
