"""What a flavour of the graph emits beside Linears: attention with its cache, positions, masks, additions with norms.

The flavours are a file each, standard.py and contrib.py.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture, Layer, Norm, Rope
from soco_export.onnx.emit.norm import Norms, Parameters
from soco_export.onnx.emit.rotation import Rotation
from soco_export.onnx.settings import CacheType
from soco_export.onnx.write.graph import Graph

FLOAT, INT64 = ir.DataType.FLOAT, ir.DataType.INT64


@dataclass(frozen=True)
class GraphInputs:
    """The graph's inputs apart from the cache; `positions` is None where the flavour derives them."""

    tokens: ir.Value
    mask: ir.Value
    positions: ir.Value | None


@dataclass(frozen=True)
class Heads:
    """What one layer's attention reads: projections [batch, sequence, heads · size of one], the cache so far, sinks.

    `scales`: of keys and values in a cache of integers, [1, kv_heads, 1, head_dim] each.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    sinks: ir.Value | None = None
    scales: tuple[ir.Value, ir.Value] | None = None


@dataclass(frozen=True)
class Update:
    """What a sublayer adds: value [batch, sequence, hidden], and a bias [hidden] that is not in it yet, or None."""

    value: ir.Value
    bias: ir.Value | None


class AttentionFlavour(ABC):
    """Emits attention and additions with their norm; `prepare` is called once, before the first layer."""

    def __init__(self, graph: Graph, architecture: Architecture, norms: Norms, cache: CacheType) -> None:
        self.graph = graph
        self.architecture = architecture
        self.norms = norms
        self.cache = cache
        self.rotation = Rotation(graph, architecture)
        self.outside = [rope for rope in ropes_of(architecture) if not self.turns_inside(rope)]

    @property
    @abstractmethod
    def needs_positions(self) -> bool:
        """Whether position_ids is an input of the graph."""

    @abstractmethod
    def turns_inside(self, rope: Rope) -> bool:
        """Whether `attend` rotates by itself; else queries and keys are turned before."""

    @abstractmethod
    def prepare(self, inputs: GraphInputs) -> None:
        """Emit what all layers share: masks, rotary tables."""

    @abstractmethod
    def attend(self, heads: Heads, layer: Layer) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return (output [batch, sequence, heads · numbers of a value], present key, present value)."""

    @abstractmethod
    def add_norm(
        self, x: ir.Value, update: Update | None, parameters: Parameters, norm: Norm
    ) -> tuple[ir.Value, ir.Value]:
        """Return (norm(x + update), x + update)."""

    def turn(self, query: ir.Value, key: ir.Value, rope: Rope | None) -> tuple[ir.Value, ir.Value]:
        """Rotate queries and keys, unless `attend` does."""
        if rope not in self.outside:
            return query, key
        shape = self.architecture.attention
        return self.rotation.turn(query, shape.heads, rope), self.rotation.turn(key, shape.kv_heads, rope)

    def add(self, x: ir.Value, update: Update | None) -> ir.Value:
        """Return x + update."""
        return x if update is None else self.graph.op("Add", x, self.complete(update))

    def complete(self, update: Update) -> ir.Value:
        """Return an update with its bias in it."""
        return update.value if update.bias is None else self.graph.op("Add", update.value, update.bias)

    def scoring(self) -> dict[str, Any]:
        """Return the attributes of how scores are made, where they are not the operator's own."""
        shape = self.architecture.attention
        return ({} if shape.scale is None else {"scale": float(shape.scale)}) | (
            {} if shape.cap is None else {"softcap": float(shape.cap)}
        )

    # keys [...,1,t] ── Sub queries [...,s,1] ── Cast ── Mul slopes [heads,1,1] ── [...,heads,s,t]
    def distance_bias(self, keys: ir.Value, queries: ir.Value, slopes: tuple[float, ...]) -> ir.Value:
        """Return alibi's bias: slope · (key - query), in the graph's type."""
        graph = self.graph
        distance = graph.op("Cast", graph.op("Sub", keys, queries), to=FLOAT)
        column = graph.stored("alibi.slopes", np.array(slopes, np.float32).reshape(-1, 1, 1))
        bias = graph.op("Mul", distance, column)
        return bias if graph.dtype == FLOAT else graph.op("Cast", bias, to=graph.dtype)

    # attention_mask [b,t] ── Shape ── t ─── Range ── keys    [1,t]
    # input_ids      [b,s] ── Shape ── s ─── Range ── queries [s,1]     (slots t-s … t-1)
    def slots(self, inputs: GraphInputs) -> tuple[ir.Value, ir.Value]:
        """Return the slots of the cache that hold keys [1, t], and those of the queries [s, 1]."""
        graph, zero, one = self.graph, self.graph.constant(0), self.graph.constant(1)
        with graph.scope("mask"):
            total = graph.op("Squeeze", graph.op("Shape", inputs.mask, start=1, end=2))
            new = graph.op("Squeeze", graph.op("Shape", inputs.tokens, start=1, end=2))
            slots = graph.op("Range", zero, total, one)
            past = graph.op("Sub", total, new)
            queries = graph.op("Range", past, total, one)
            keys = graph.op("Unsqueeze", slots, graph.constant([0]))
            return keys, graph.op("Unsqueeze", queries, graph.constant([1]))


def ropes_of(architecture: Architecture) -> list[Rope]:
    """Return the different rotations of the layers, in order."""
    return list(dict.fromkeys(layer.rope for layer in architecture.each if layer.rope))
