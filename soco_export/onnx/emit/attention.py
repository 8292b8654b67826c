"""The two flavours of what is not a Linear: attention with its cache, positions, masks, and normalisation.

`standard` uses ONNX's own operators and an explicit mask, so that left-padded batches and sliding windows are right on
any runtime. `contrib` uses ONNX Runtime's fused operators: keys start at slot 0 in every row, hence right padding only.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.write.graph import CONTRIB, Graph

FLOAT, INT64, INT32, BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL


@dataclass(frozen=True)
class Inputs:
    """The graph's inputs apart from the cache; `positions` is None where the flavour derives them."""

    tokens: ir.Value
    mask: ir.Value
    positions: ir.Value | None


@dataclass(frozen=True)
class Heads:
    """What one layer's attention reads: projections [batch, sequence, heads · head_dim] and the cache so far."""

    query: ir.Value
    key: ir.Value
    value: ir.Value
    past_key: ir.Value
    past_value: ir.Value


@dataclass(frozen=True)
class Update:
    """What a sublayer adds: value [batch, sequence, hidden], and a bias [hidden] that is not in it yet, or None."""

    value: ir.Value
    bias: ir.Value | None


class Flavour(ABC):
    """Emits attention and normalisation; `prepare` is called once, before the first layer."""

    def __init__(self, graph: Graph, architecture: Architecture) -> None:
        self.graph = graph
        self.architecture = architecture

    @property
    @abstractmethod
    def needs_positions(self) -> bool:
        """Whether position_ids is an input of the graph."""

    @abstractmethod
    def prepare(self, inputs: Inputs) -> None:
        """Emit what all layers share: masks, rotary tables."""

    @abstractmethod
    def attend(self, heads: Heads, window: int | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Return (output [batch, sequence, heads · head_dim], present key, present value)."""

    @abstractmethod
    def add_norm(
        self, x: ir.Value, update: Update | None, scale: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Return (norm(x + update), x + update)."""

    def norm(self, x: ir.Value, scale: ir.Value, bias: ir.Value | None) -> ir.Value:
        """Normalise the last axis, in float32 inside."""
        epsilon = self.architecture.norm.epsilon
        if bias is None:
            return self.graph.op("RMSNormalization", x, scale, axis=-1, epsilon=epsilon, stash_type=1)
        return self.graph.op("LayerNormalization", x, scale, bias, axis=-1, epsilon=epsilon, stash_type=1)


FLAVOURS: dict[str, type[Flavour]] = {}


def flavour(name: str) -> Callable[[type[Flavour]], type[Flavour]]:
    """Register a flavour under the word that export.flavour uses."""

    def register(cls: type[Flavour]) -> type[Flavour]:
        FLAVOURS[name] = cls
        return cls

    return register


@flavour("standard")
class Standard(Flavour):
    """Opset 23: Attention, RotaryEmbedding, RMSNormalization, LayerNormalization."""

    needs_positions = True

    def prepare(self, inputs: Inputs) -> None:
        """Emit one mask per window size, and cosines and sines of the positions at hand."""
        self._slots(inputs)
        self.masks = {window: self._mask(inputs, window) for window in dict.fromkeys(self.architecture.windows)}
        if self.architecture.rope:
            with self.graph.scope("rope"):
                self.cos, self.sin = self._rotation(inputs.positions, self.architecture.rope)

    # attention_mask [b,t] ── Shape ── t ─── Range ── keys    [1,t]
    # input_ids      [b,s] ── Shape ── s ─── Range ── queries [s,1]     (slots t-s … t-1)
    def _slots(self, inputs: Inputs) -> None:
        graph, zero, one = self.graph, self.graph.constant(0), self.graph.constant(1)
        with graph.scope("mask"):
            total = graph.op("Squeeze", graph.op("Shape", inputs.mask, start=1, end=2))
            new = graph.op("Squeeze", graph.op("Shape", inputs.tokens, start=1, end=2))
            slots = graph.op("Range", zero, total, one)
            past = graph.op("Sub", total, new)
            queries = graph.op("Range", past, total, one)
            self.keys = graph.op("Unsqueeze", slots, graph.constant([0]))
            self.queries = graph.op("Unsqueeze", queries, graph.constant([1]))

    # keys ≤ queries ──┬─ And ── And ── Or ── [b,1,s,t]
    # keys > queries-w ┘          │      │
    # attention_mask ── Cast ─────┘      │
    # keys = queries ────────────────────┘   (a padding row sees itself: no empty softmax, no NaN)
    def _mask(self, inputs: Inputs, window: int | None) -> ir.Value:
        graph = self.graph
        with graph.scope("mask"):
            seen = graph.op("LessOrEqual", self.keys, self.queries)
            if window is not None:
                oldest = graph.op("Sub", self.queries, graph.constant(window))
                seen = graph.op("And", seen, graph.op("Greater", self.keys, oldest))
            real = graph.op("Unsqueeze", graph.op("Cast", inputs.mask, to=BOOL), graph.constant([1, 2]))
            itself = graph.op("Equal", self.keys, self.queries)
            return graph.op("Or", graph.op("And", seen, real), itself)

    # position_ids [b,s] ── Cast ── Unsqueeze ── Mul frequencies ─┬─ Cos ── [b,s,head_dim/2]
    #                                                             └─ Sin ── [b,s,head_dim/2]
    def _rotation(self, positions: ir.Value | None, frequencies: tuple[float, ...]) -> tuple[ir.Value, ir.Value]:
        graph = self.graph
        column = graph.op("Unsqueeze", graph.op("Cast", positions, to=FLOAT), graph.constant([2]))
        angles = graph.op("Mul", column, graph.stored("rope.frequencies", np.array(frequencies, np.float32)))
        cos, sin = graph.op("Cos", angles), graph.op("Sin", angles)
        if graph.dtype == FLOAT:
            return cos, sin
        return graph.op("Cast", cos, to=graph.dtype), graph.op("Cast", sin, to=graph.dtype)

    # query ── RotaryEmbedding ─┐
    # key ──── RotaryEmbedding ─┤
    # value ────────────────────┼─ Attention ── output, present key, present value
    # mask, past key, past value┘
    def attend(self, heads: Heads, window: int | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend under the mask of `window`."""
        shape, reduced = self.architecture, self.graph.dtype != FLOAT
        output, key, value = self.graph.ops(
            "Attention",
            self._rotated(heads.query, shape.heads),
            self._rotated(heads.key, shape.kv_heads),
            heads.value,
            self.masks[window],
            heads.past_key,
            heads.past_value,
            outputs=3,
            q_num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            **({"softmax_precision": int(FLOAT)} if reduced else {}),
        )
        return output, key, value

    def _rotated(self, x: ir.Value, heads: int) -> ir.Value:
        if not self.architecture.rope:
            return x
        return self.graph.op("RotaryEmbedding", x, self.cos, self.sin, num_heads=heads, interleaved=0)

    # x ──┬─ Add ─┬─ norm ── h
    # up ─┘       └───────── x
    def add_norm(
        self, x: ir.Value, update: Update | None, scale: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Add, then normalise."""
        total = x
        if update is not None:
            value = update.value if update.bias is None else self.graph.op("Add", update.value, update.bias)
            total = self.graph.op("Add", x, value)
        return self.norm(total, scale, bias), total


@flavour("contrib")
class Contrib(Flavour):
    """ONNX Runtime's own: GroupQueryAttention with rotation inside, Skip(Simplified)LayerNormalization."""

    @property
    def needs_positions(self) -> bool:
        """Only learned positions need them: GroupQueryAttention counts by itself."""
        return self.architecture.names.positions is not None

    # attention_mask [b,t] ─┬─ ReduceSum ── Sub 1 ── Cast ── seqlens_k [b]
    #                       └─ Shape ── Cast ─────────────── total_sequence_length
    def prepare(self, inputs: Inputs) -> None:
        """Emit the lengths that GroupQueryAttention reads, and the rotary tables."""
        graph = self.graph
        with graph.scope("lengths"):
            lengths = graph.op("ReduceSum", inputs.mask, graph.constant([1]), keepdims=0)
            self.lengths = graph.op("Cast", graph.op("Sub", lengths, graph.constant(1)), to=INT32)
            total = graph.op("Squeeze", graph.op("Shape", inputs.mask, start=1, end=2))
            self.total = graph.op("Cast", total, to=INT32)
        self.tables = self._tables()

    def _tables(self) -> tuple[ir.Value | None, ir.Value | None]:
        if not self.architecture.rope:
            return None, None
        frequencies = np.array(self.architecture.rope, np.float32)
        angles = np.arange(self.architecture.context, dtype=np.float32)[:, None] * frequencies
        return self.graph.weight("rope.cos", np.cos(angles)), self.graph.weight("rope.sin", np.sin(angles))

    # query, key, value ────────────────┐
    # past key, past value ─────────────┼─ GroupQueryAttention ── output, present key, present value
    # seqlens_k, total, (cos, sin) ─────┘
    def attend(self, heads: Heads, window: int | None) -> tuple[ir.Value, ir.Value, ir.Value]:
        """Attend to the slots before seqlens_k, the last `window` of them."""
        shape = self.architecture
        output, key, value = self.graph.ops(
            f"{CONTRIB}::GroupQueryAttention",
            heads.query,
            heads.key,
            heads.value,
            heads.past_key,
            heads.past_value,
            self.lengths,
            self.total,
            *self.tables,
            outputs=3,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=int(shape.rope is not None),
            local_window_size=-1 if window is None else window,
        )
        return output, key, value

    # x ──────┬─ Skip(Simplified)LayerNormalization ─┬─ h
    # update ─┤                                      └─ x
    # its bias┘
    def add_norm(
        self, x: ir.Value, update: Update | None, scale: ir.Value, bias: ir.Value | None
    ) -> tuple[ir.Value, ir.Value]:
        """Add and normalise in one node, the bias of the sublayer's last Linear with it."""
        if update is None:
            return self.norm(x, scale, bias), x
        op = "SkipSimplifiedLayerNormalization" if bias is None else "SkipLayerNormalization"
        parameters = [scale] if bias is None else [scale, bias]
        late = [] if update.bias is None else [update.bias]
        inputs, epsilon = [x, update.value, *parameters, *late], self.architecture.norm.epsilon
        normed, _, _, total = self.graph.ops(f"{CONTRIB}::{op}", *inputs, outputs=4, epsilon=epsilon)
        return normed, total
