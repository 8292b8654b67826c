"""The two flavours of what is not a Linear: attention with its cache, positions, masks, and normalisation.

`standard` uses ONNX's own operators and an explicit mask, so that left-padded batches and sliding windows are right on
any runtime. `contrib` uses ONNX Runtime's fused operators: keys start at slot 0 in every row, hence right padding only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture, Layer, Norm, Rope
from soco_export.onnx.describe.order import padded
from soco_export.onnx.emit.norm import Norms, Parameters
from soco_export.onnx.emit.rotation import Rotation
from soco_export.onnx.write.graph import CONTRIB, Graph

_Tables = tuple[ir.Value | None, ir.Value | None]
FLOAT, INT64, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL


@dataclass(frozen=True)
class GraphInputs:
    """The graph's inputs apart from the cache; `positions` is None where the flavour derives them."""

    tokens: ir.Value
    mask: ir.Value
    positions: ir.Value | None


@dataclass(frozen=True)
class Heads:
    """What one layer's attention reads: projections [batch, sequence, heads · head_dim], the cache so far, sinks."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value
    sinks: ir.Value | None = None


@dataclass(frozen=True)
class Update:
    """What a sublayer adds: value [batch, sequence, hidden], and a bias [hidden] that is not in it yet, or None."""

    value: ir.Value
    bias: ir.Value | None


class AttentionFlavour(ABC):
    """Emits attention and additions with their norm; `prepare` is called once, before the first layer."""

    def __init__(self, graph: Graph, architecture: Architecture, norms: Norms) -> None:
        self.graph = graph
        self.architecture = architecture
        self.norms = norms
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
        """Return (output [batch, sequence, heads · head_dim], present key, present value)."""

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
        return ({} if shape.scale is None else {"scale": shape.scale}) | (
            {} if shape.cap is None else {"softcap": shape.cap}
        )

    # slots [1,t] ── Sub slots of queries [s,1] ── Cast ── Mul slopes [heads,1,1] ── [heads,s,t]
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


FLAVOURS: dict[str, type[AttentionFlavour]] = {}


def flavour(name: str) -> Callable[[type[AttentionFlavour]], type[AttentionFlavour]]:
    """Register a flavour under the word that export.flavour uses."""

    def register(cls: type[AttentionFlavour]) -> type[AttentionFlavour]:
        FLAVOURS[name] = cls
        return cls

    return register


@flavour("standard")
class Standard(AttentionFlavour):
    """Opset 23: Attention, RotaryEmbedding, RMSNormalization, LayerNormalization."""

    needs_positions = True

    def turns_inside(self, rope: Rope) -> bool:
        """Never: Attention knows no positions."""
        return False

    def prepare(self, inputs: GraphInputs) -> None:
        """Emit one mask per window size, and cosines and sines of the positions at hand."""
        self.keys, self.queries = self.slots(inputs)
        windows = dict.fromkeys(layer.window for layer in self.architecture.each)
        self.masks = {window: self._mask(inputs, window) for window in windows}
        if self.outside:
            assert inputs.positions is not None
            self.rotation.prepare(self.outside, inputs.positions)

    # keys ≤ queries ──┬─ And ── And ── Or ── [b,1,s,t]
    # keys > queries-w ┘          │      │
    # attention_mask ── Cast ─────┘      │
    # keys = queries ────────────────────┘   (a padding row sees itself: no empty softmax, no NaN)
    def _mask(self, inputs: GraphInputs, window: int | None) -> ir.Value:
        graph = self.graph
        with graph.scope("mask"):
            seen = graph.op("LessOrEqual", self.keys, self.queries)
            if window is not None:
                oldest = graph.op("Sub", self.queries, graph.constant(window))
                seen = graph.op("And", seen, graph.op("Greater", self.keys, oldest))
            real = graph.op("Unsqueeze", graph.op("Cast", inputs.mask, to=BOOL), graph.constant([1, 2]))
            itself = graph.op("Equal", self.keys, self.queries)
            mask = graph.op("Or", graph.op("And", seen, real), itself)
            if self.architecture.attention.sinks is not None:  # every query sees the sink, which comes first
                mask = graph.op("Pad", mask, graph.constant([0, 0, 0, 1, 0, 0, 0, 0]), graph.constant(True, BOOL))
            return self._biased(mask)

    # alibi: mask ── Where bias, -∞ ── [b,heads,s,t]
    def _biased(self, mask: ir.Value) -> ir.Value:
        slopes = self.architecture.attention.alibi
        if slopes is None:
            return mask
        bias = self.distance_bias(self.keys, self.queries, slopes)
        return self.graph.op("Where", mask, bias, self.graph.constant(float("-inf"), self.graph.dtype))

    # query, key, value ────┐
    # mask ─────────────────┼─ Attention ── output, present key, present value
    # past key, past value ─┘
    def attend(self, heads: Heads, layer: Layer) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend under the mask of the layer's window."""
        if heads.sinks is not None:
            return self._attend_with_sinks(heads, heads.sinks, layer)
        shape, reduced = self.architecture.attention, self.graph.dtype != FLOAT
        output, key, value = self.graph.ops(
            "Attention",
            heads.query,
            heads.key,
            heads.value,
            self.masks[layer.window],
            heads.past_key,
            heads.past_value,
            outputs=3,
            q_num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            **self.scoring(),
            **({"softmax_precision": int(FLOAT)} if reduced else {}),
        )
        return output, key, value

    # query ── [b,heads,s,d] ── Concat -sink/scale ──────────┐
    # past key, key ── present ── Pad 1 at the end of each ──┼─ Pad 0 in front ── Attention ── output
    # past value, value ── present ──────────────────────────┘
    #
    # A softmax does not mind a shift: the sink is a key that scores 0, and all others score less by the sink.
    def _attend_with_sinks(self, heads: Heads, sinks: ir.Value, layer: Layer) -> tuple[ir.Value, ir.Value, ir.Value]:
        graph, shape, size = self.graph, self.architecture.attention, self.architecture.attention.head_dim
        scale = size**-0.5 if shape.scale is None else shape.scale
        query = self._apart(heads.query, shape.heads)
        key = graph.op("Concat", heads.past_key, self._apart(heads.key, shape.kv_heads), axis=2)
        value = graph.op("Concat", heads.past_value, self._apart(heads.value, shape.kv_heads), axis=2)
        zero, one = graph.constant(0.0, graph.dtype), graph.constant(1.0, graph.dtype)
        column = graph.op("Reshape", sinks, graph.constant([1, -1, 1, 1]))
        offset = graph.op("Mul", column, graph.constant(-1.0 / scale, graph.dtype))
        first = graph.op("Slice", query, graph.constant([0]), graph.constant([1]), graph.constant([3]))
        longer = graph.op("Concat", query, graph.op("Add", graph.op("Mul", first, zero), offset), axis=3)
        ends, front = graph.constant([0, 0, 0, 0, 0, 0, 0, 1]), graph.constant([0, 0, 1, 0, 0, 0, 0, 0])
        output = graph.op(
            "Attention",
            longer,
            graph.op("Pad", graph.op("Pad", key, ends, one), front, zero),
            graph.op("Pad", value, front, zero),
            self.masks[layer.window],
            scale=scale,
            **({"softmax_precision": int(FLOAT)} if graph.dtype != FLOAT else {}),
        )
        across = graph.op("Transpose", output, perm=[0, 2, 1, 3])
        return graph.op("Reshape", across, graph.constant([0, 0, shape.heads * size])), key, value

    def _apart(self, x: ir.Value, heads: int) -> ir.Value:
        """Return [batch, sequence, heads · head_dim] as [batch, heads, sequence, head_dim]."""
        size = self.architecture.attention.head_dim
        split = self.graph.op("Reshape", x, self.graph.constant([0, 0, heads, size]))
        return self.graph.op("Transpose", split, perm=[0, 2, 1, 3])

    # x ──┬─ Add ─┬─ norm ── h
    # up ─┘       └───────── x
    def add_norm(
        self, x: ir.Value, update: Update | None, parameters: Parameters, norm: Norm
    ) -> tuple[ir.Value, ir.Value]:
        """Add, then normalise."""
        total = self.add(x, update)
        return self.norms.apply(total, parameters, norm), total


@flavour("contrib")
class Contrib(AttentionFlavour):
    """ONNX Runtime's own: GroupQueryAttention, mostly with rotation inside, Skip(Simplified)LayerNormalization."""

    @property
    def needs_positions(self) -> bool:
        """GroupQueryAttention counts by itself: only learned positions and rotation outside need them."""
        return self.architecture.tensors.positions is not None or bool(self.outside)

    def turns_inside(self, rope: Rope) -> bool:
        """Its tables are for heads of a multiple of 16 numbers, and for angles that a position alone decides."""
        shape = self.architecture.attention
        late = shape.norm is not None and shape.norm.rotated
        return shape.head_dim % 16 == 0 and not rope.by_length and not late

    # attention_mask [b,t] ─┬─ ReduceSum ── Sub 1 ── Cast ── seqlens_k [b]
    #                       └─ Shape ── Cast ─────────────── total_sequence_length
    def prepare(self, inputs: GraphInputs) -> None:
        """Emit the lengths that GroupQueryAttention reads, and the rotary tables."""
        graph = self.graph
        with graph.scope("lengths"):
            lengths = graph.op("ReduceSum", inputs.mask, graph.constant([1]), keepdims=0)
            self.lengths = graph.op("Cast", graph.op("Sub", lengths, graph.constant(1)), to=INT32)
            total = graph.op("Squeeze", graph.op("Shape", inputs.mask, start=1, end=2))
            self.total = graph.op("Cast", total, to=INT32)
        inside = [rope for rope in ropes_of(self.architecture) if rope not in self.outside]
        self.tables: dict[Rope | None, _Tables] = {rope: self._tables(index, rope) for index, rope in enumerate(inside)}
        if self.outside:
            assert inputs.positions is not None
            self.rotation.prepare(self.outside, inputs.positions)
        self.bias = self._bias(inputs)

    def _tables(self, index: int, rope: Rope) -> _Tables:
        name, size = f"rope.{index}" if index else "rope", self.architecture.attention.head_dim
        frequencies = padded(rope.frequencies, size)
        angles = np.arange(self.architecture.context, dtype=np.float32)[:, None] * frequencies
        magnitudes = padded((rope.magnitude,) * len(rope.frequencies), size, 1.0)
        cos, sin = np.cos(angles) * magnitudes, np.sin(angles) * magnitudes
        return self.graph.weight(f"{name}.cos", cos), self.graph.weight(f"{name}.sin", sin)

    # alibi: bias [heads,s,t] ── Unsqueeze ── [1,heads,s,t]
    def _bias(self, inputs: GraphInputs) -> ir.Value | None:
        slopes = self.architecture.attention.alibi
        if slopes is None:
            return None
        bias = self.distance_bias(*self.slots(inputs), slopes)
        return self.graph.op("Unsqueeze", bias, self.graph.constant([0]))

    # query, key, value ────────────────┐
    # past key, past value ─────────────┼─ GroupQueryAttention ── output, present key, present value
    # seqlens_k, total, (cos, sin) ─────┤
    # (bias of alibi) (sinks) ──────────┘
    def attend(self, heads: Heads, layer: Layer) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend to the slots before seqlens_k, the last `window` of them."""
        shape = self.architecture.attention
        tables = self.tables.get(layer.rope, (None, None))
        output, key, value = self.graph.ops(
            f"{CONTRIB}::GroupQueryAttention",
            heads.query,
            heads.key,
            heads.value,
            heads.past_key,
            heads.past_value,
            self.lengths,
            self.total,
            *tables,
            *([] if self.bias is None and heads.sinks is None else [None, self.bias]),
            *([] if heads.sinks is None else [heads.sinks]),
            outputs=3,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=int(layer.rope in self.tables),
            local_window_size=-1 if layer.window is None else layer.window,
            **self.scoring(),
        )
        return output, key, value

    # x ──────┬─ Skip(Simplified)LayerNormalization ─┬─ h
    # update ─┤                                      └─ x
    # its bias┘
    def add_norm(
        self, x: ir.Value, update: Update | None, parameters: Parameters, norm: Norm
    ) -> tuple[ir.Value, ir.Value]:
        """Add and normalise in one node, the bias of the sublayer's last projection with it."""
        if update is None:
            return self.norms.apply(x, parameters, norm), x
        op = "SkipSimplifiedLayerNormalization" if norm.kind == "rms" else "SkipLayerNormalization"
        factor, bias = parameters
        late = [] if update.bias is None else [update.bias]
        shift = [] if norm.kind == "rms" else [bias] if bias is not None or late else []
        inputs: list[ir.Value | None] = [x, update.value, factor, *shift, *late]
        normed, _, _, total = self.graph.ops(f"{CONTRIB}::{op}", *inputs, outputs=4, epsilon=norm.epsilon)
        return normed, total
