"""Rotary positions outside of the attention operator: cosines and sines of the positions at hand."""

from __future__ import annotations

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture, Rope
from soco_export.onnx.describe.order import padded
from soco_export.onnx.write.graph import Graph

_FLOAT = ir.DataType.FLOAT


class Rotation:
    """Emits each rotation's cosines and sines once, and turns heads by them."""

    def __init__(self, graph: Graph, architecture: Architecture) -> None:
        self.graph = graph
        self.architecture = architecture
        self._waves: dict[Rope, tuple[ir.Value, ir.Value]] = {}

    def prepare(self, ropes: list[Rope], positions: ir.Value) -> None:
        """Emit the waves of all `ropes` for `positions` [batch, sequence]."""
        for index, rope in enumerate(ropes):
            name = "rope" if index == 0 else f"rope.{index}"
            with self.graph.scope(name):
                self._waves[rope] = self._emitted(name, rope, positions)

    # position_ids [b,s] ── Cast ── Unsqueeze ── Mul frequencies ─┬─ Cos (── Mul magnitude) ── [b,s,head_dim/2]
    #                                                             └─ Sin (── Mul magnitude) ── [b,s,head_dim/2]
    def _emitted(self, name: str, rope: Rope, positions: ir.Value) -> tuple[ir.Value, ir.Value]:
        graph = self.graph
        moved = graph.op("Cast", positions, to=_FLOAT)
        column = graph.op("Unsqueeze", moved, graph.constant([2]))
        angles = graph.op("Mul", column, self._frequencies(name, rope, moved))
        waves = [graph.op("Cos", angles), graph.op("Sin", angles)]
        if rope.magnitude != 1:
            magnitudes = (rope.magnitude,) * len(rope.frequencies)
            factor = graph.stored(f"{name}.magnitude", padded(magnitudes, self.architecture.attention.head_dim, 1.0))
            waves = [graph.op("Mul", wave, factor) for wave in waves]
        if graph.dtype != _FLOAT:
            waves = [graph.op("Cast", wave, to=graph.dtype) for wave in waves]
        return waves[0], waves[1]

    # longrope:  longest > switch ── Where beyond, frequencies
    # dynamic:   longest ── Mul factor/context ── Sub factor-1 ── Max 1 ── Pow -2i/(width-2) ── Mul frequencies
    def _frequencies(self, name: str, rope: Rope, positions: ir.Value) -> ir.Value:
        graph, size = self.graph, self.architecture.attention.head_dim
        stored = graph.stored(f"{name}.frequencies", padded(rope.frequencies, size))
        if not rope.by_length:
            return stored
        longest = graph.op("Add", graph.op("ReduceMax", positions, keepdims=0), graph.constant(1.0, _FLOAT))
        if rope.switch is not None:
            beyond = graph.stored(f"{name}.beyond", padded(rope.beyond, size))
            is_long = graph.op("Greater", longest, graph.constant(float(rope.switch), _FLOAT))
            return graph.op("Where", is_long, beyond, stored)
        assert rope.growth is not None
        factor, context, width = rope.growth
        stretched = graph.op("Mul", longest, graph.constant(factor / context, _FLOAT))
        ratio = graph.op("Sub", stretched, graph.constant(factor - 1, _FLOAT))
        ratio = graph.op("Max", ratio, graph.constant(1.0, _FLOAT))
        exponents = tuple(-2.0 * pair / (width - 2) for pair in range(len(rope.frequencies)))
        powers = graph.op("Pow", ratio, graph.stored(f"{name}.exponents", padded(exponents, size)))
        return graph.op("Mul", stored, powers)

    def turn(self, x: ir.Value, heads: int, rope: Rope) -> ir.Value:
        """Turn queries or keys [batch, sequence, heads · head_dim]."""
        return self.graph.op("RotaryEmbedding", x, *self._waves[rope], num_heads=heads, interleaved=0)
