"""The flavour `standard`: ONNX's own operators, opset 23.

The mask is explicit, so that padded batches and sliding windows are right on any runtime: a window counts tokens, not
the slots among which padding lies.
"""

from __future__ import annotations

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Layer, Norm, Rope
from soco_export.onnx.emit.attention import FLOAT, AttentionFlavour, GraphInputs, Heads, Update
from soco_export.onnx.emit.norm import Parameters


class Standard(AttentionFlavour):
    """Attention, RotaryEmbedding, RMSNormalization, LayerNormalization."""

    needs_positions = True

    def turns_inside(self, rope: Rope) -> bool:
        """Never: Attention knows no positions."""
        return False

    def prepare(self, inputs: GraphInputs) -> None:
        """Emit one mask per window size, and cosines and sines of the positions at hand."""
        self.keys, self.queries = self.slots(inputs)
        windows = dict.fromkeys(layer.window for layer in self.architecture.each)
        self.counted = self._counted(inputs) if self.architecture.attention.alibi or any(windows) else None
        self.masks = {window: self._mask(inputs, window) for window in windows}
        if self.outside:
            assert inputs.positions is not None
            self.rotation.prepare(self.outside, inputs.positions)

    # attention_mask ── CumSum ─┬─ Unsqueeze ─────────────────────── tokens up to each key   [b,1,1,t]
    #                           └─ Gather slots of queries [s,1] ─── tokens up to each query [b,1,s,1]
    def _counted(self, inputs: GraphInputs) -> tuple[ir.Value, ir.Value]:
        """Return how many tokens there are up to each key, and up to each query."""
        graph = self.graph
        with graph.scope("mask"):
            count = graph.op("CumSum", inputs.mask, graph.constant(1))
            queries = graph.op("Gather", count, self.queries, axis=1)
            return graph.op("Unsqueeze", count, graph.constant([1, 2])), graph.op(
                "Unsqueeze", queries, graph.constant([1])
            )

    # keys ≤ queries ─────┬─ And ── And ── Or ── [b,1,s,t]
    # counted keys > q-w ─┘          │      │
    # attention_mask ── Cast ────────┘      │
    # keys = queries ───────────────────────┘   (a padding row sees itself: no empty softmax, no NaN)
    def _mask(self, inputs: GraphInputs, window: int | None) -> ir.Value:
        graph = self.graph
        with graph.scope("mask"):
            seen = graph.op("LessOrEqual", self.keys, self.queries)
            if window is not None and self.counted is not None:
                keys, queries = self.counted
                oldest = graph.op("Sub", queries, graph.constant(window))
                seen = graph.op("And", seen, graph.op("Greater", keys, oldest))
            real = graph.op("Unsqueeze", graph.op("Cast", inputs.mask, to=ir.DataType.BOOL), graph.constant([1, 2]))
            itself = graph.op("Equal", self.keys, self.queries)
            mask = graph.op("Or", graph.op("And", seen, real), itself)
            if self.architecture.attention.sinks is not None:  # every query sees the sink, which comes first
                mask = graph.op(
                    "Pad", mask, graph.constant([0, 0, 0, 1, 0, 0, 0, 0]), graph.constant(True, ir.DataType.BOOL)
                )
            return self._biased(mask)

    # alibi: mask ── Where bias, -∞ ── [b,heads,s,t]
    def _biased(self, mask: ir.Value) -> ir.Value:
        slopes = self.architecture.attention.alibi
        if slopes is None or self.counted is None:
            return mask
        bias = self.distance_bias(*self.counted, slopes)
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
        graph, shape = self.graph, self.architecture.attention
        size, of_value = shape.head_dim, self.architecture.value_size(layer)
        scale = size**-0.5 if shape.scale is None else float(shape.scale)
        query = self._apart(heads.query, shape.heads, size)
        key = graph.op("Concat", heads.past_key, self._apart(heads.key, shape.kv_heads, size), axis=2)
        value = graph.op("Concat", heads.past_value, self._apart(heads.value, shape.kv_heads, of_value), axis=2)
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
        return graph.op("Reshape", across, graph.constant([0, 0, shape.heads * of_value])), key, value

    def _apart(self, x: ir.Value, heads: int, size: int) -> ir.Value:
        """Return [batch, sequence, heads · size] as [batch, heads, sequence, size]."""
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
