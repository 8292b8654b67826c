"""Normalisations: reads what a `Norm` stores, and normalises queries and keys head by head."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture, HeadNorm, Norm
from soco_export.onnx.source import WeightSource
from soco_export.onnx.write.graph import Graph
from soco_export.onnx.write.matrix import Array, Order

Parameters = tuple[ir.Value, ir.Value | None]


class Norms:
    """Emits the normalisations of one checkpoint."""

    def __init__(self, graph: Graph, architecture: Architecture, source: WeightSource) -> None:
        self.graph = graph
        self.architecture = architecture
        self.source = source

    def parameters(self, name: str, norm: Norm, size: int) -> Parameters:
        """Return (factor [size], bias [size] or None) of the norm `name`."""
        bias = self.graph.weight(f"{name}.bias", self.source.read(f"{name}.bias")) if norm.bias else None
        if norm.weight:
            return self.graph.weight(f"{name}.weight", self._factor(f"{name}.weight", norm)), bias
        return self.graph.weight(f"norm.ones_{size}", np.ones(size, np.float32)), bias

    def _factor(self, name: str, norm: Norm) -> Array:
        stored = self.source.read(name)[:]
        return stored + np.float32(norm.offset) if norm.offset else stored

    def apply(self, x: ir.Value, parameters: Parameters, norm: Norm) -> ir.Value:
        """Normalise the last axis, in float32 inside."""
        factor, bias = parameters
        if norm.kind == "rms":
            return self.graph.op("RMSNormalization", x, factor, axis=-1, epsilon=float(norm.epsilon), stash_type=1)
        inputs = [factor] if bias is None else [factor, bias]
        return self.graph.op("LayerNormalization", x, *inputs, axis=-1, epsilon=float(norm.epsilon), stash_type=1)

    def heads(self, x: ir.Value, heads: int, prefix: str, name: str, order: Order) -> ir.Value:
        """Normalise queries or keys [batch, sequence, heads · head_dim] whose heads are in `order`."""
        how = self.architecture.attention.norm
        assert how is not None
        with self.graph.scope(name.replace(".{}", "")):
            return (
                self._whole(x, heads, f"{prefix}.{name}", how, order)
                if how.span == "whole"
                else self._split(x, heads, f"{prefix}.{name}", how, order)
            )

    def _whole(self, x: ir.Value, heads: int, name: str, how: HeadNorm, order: Order) -> ir.Value:
        size = self.architecture.attention.head_dim
        factor = self._factor(f"{name}.weight", how.norm).reshape(heads, size)
        stored = self.graph.weight(f"{name}.weight", _ordered(factor, order).ravel())
        return self.apply(x, (stored, None), how.norm)

    # head:  [b,s,heads·d] ── Reshape [b,s,heads,d] ── norm γ[d] ── Reshape [b,s,heads·d]
    # each:                             ''            ── norm 1 ── Mul γ[heads,d](── Add β) ── Reshape
    def _split(self, x: ir.Value, heads: int, name: str, how: HeadNorm, order: Order) -> ir.Value:
        graph, size = self.graph, self.architecture.attention.head_dim
        split = graph.op("Reshape", x, graph.constant([0, 0, heads, size]))
        if how.span == "head":
            factor = graph.weight(f"{name}.weight", _ordered(self._factor(f"{name}.weight", how.norm), order))
            bias = (
                graph.weight(f"{name}.bias", _ordered(self.source.read(f"{name}.bias")[:], order))
                if how.norm.bias
                else None
            )
            normed = self.apply(split, (factor, bias), how.norm)
        else:
            ones = graph.weight(f"norm.ones_{size}", np.ones(size, np.float32))
            normed = self.apply(split, (ones, None), how.norm)
            for part, op in zip(how.norm.parts(), ("Mul", "Add"), strict=False):
                normed = graph.op(op, normed, self._per_head(name, part, heads, order))
        return graph.op("Reshape", normed, graph.constant([0, 0, heads * size]))

    def _per_head(self, name: str, part: str, heads: int, order: Order) -> ir.Value:
        apart = [f"{name.format(head)}.{part}" for head in range(heads)] if "{}" in name else []
        stored = (
            np.stack([self.source.read(one)[:] for one in apart]) if apart else self.source.read(f"{name}.{part}")[:]
        )
        return self.graph.weight(f"{name.replace('.{}', '')}.{part}", _ordered(stored, order))


def _ordered(values: Array, order: Order) -> Array:
    return values if order is None else values[..., order]
