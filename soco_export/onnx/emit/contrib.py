"""The flavour `contrib`: ONNX Runtime's fused operators.

Keys start at slot 0 in every row, hence right padding only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from soco_export.files.names import ROUNDED_CACHE
from soco_export.onnx.describe.architecture import Layer, Norm, Rope
from soco_export.onnx.describe.order import padded
from soco_export.onnx.emit.attention import AttentionFlavour, GraphInputs, Heads, Update, ropes_of
from soco_export.onnx.emit.norm import Parameters
from soco_export.onnx.write.graph import CONTRIB

_Tables = tuple[ir.Value | None, ir.Value | None]


def _trimmed(inputs: Sequence[ir.Value | None]) -> list[ir.Value | None]:
    """Return inputs without those at the end that are not there; the first two, tables, stay."""
    count = max([2, *(place for place, value in enumerate(inputs, 1) if value is not None)])
    return list(inputs[:count])


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
            self.lengths = graph.op("Cast", graph.op("Sub", lengths, graph.constant(1)), to=ir.DataType.INT32)
            total = graph.op("Squeeze", graph.op("Shape", inputs.mask, start=1, end=2))
            self.total = graph.op("Cast", total, to=ir.DataType.INT32)
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
            *self._read(heads),
            heads.past_key,
            heads.past_value,
            self.lengths,
            self.total,
            *_trimmed([*tables, None, self.bias, heads.sinks, *(heads.scales or ())]),
            outputs=3,
            num_heads=shape.heads,
            kv_num_heads=shape.kv_heads,
            do_rotary=int(layer.rope in self.tables),
            local_window_size=-1 if layer.window is None else layer.window,
            **self.scoring(),
            **ROUNDED_CACHE.get(self.cache, {}),
        )
        return output, key, value

    def _read(self, heads: Heads) -> tuple[ir.Value, ir.Value | None, ir.Value | None]:
        """Return query, key and value, or what they are split from: the operator takes it whole as its query."""
        parts = (heads.query, heads.key, heads.value)
        split = heads.query.producer()
        plain = self.bias is None and heads.sinks is None and heads.scales is None
        if not plain or split is None or split.op_type != "Split" or tuple(split.outputs) != parts:
            return parts
        whole = split.inputs[0]
        assert whole is not None
        self.graph.drop(split)
        return whole, None, None

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
        normed, mean, deviation, total = self.graph.ops(
            f"{CONTRIB}::{op}", *inputs, outputs=4, epsilon=float(norm.epsilon)
        )
        mean.name = deviation.name = ""  # in ONNX an output that nobody wants, which is then not written either
        return normed, total
