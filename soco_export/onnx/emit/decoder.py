"""Puts a decoder together from its description; knows neither families nor flavours.

tokens ── embed ──(+ positions)── x ── [ norm ── attention ── + ── norm ── MLP ── + ] × layers ── norm ── head ── logits
"""

from __future__ import annotations

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.emit.attention import FLAVOURS, FLOAT, INT64, Heads, Inputs, Update
from soco_export.onnx.emit.embedding import TokenTable
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.read import WeightSource
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.write.graph import Graph
from soco_train.events import Event, Notify

ACTIVATIONS = {"relu": ("Relu", {}), "gelu": ("Gelu", {}), "gelu_tanh": ("Gelu", {"approximate": "tanh"})}


class DecoderBuilder:
    """Builds one graph from one description and one checkpoint."""

    def __init__(
        self, architecture: Architecture, source: WeightSource, settings: ExportSettings, graph: Graph
    ) -> None:
        self.architecture = architecture
        self.names = architecture.names
        self.source = source
        self.settings = settings
        self.graph = graph
        self.linears = Linears(graph, source, settings)
        self.table = TokenTable(graph, architecture, self.linears)
        self.flavour = FLAVOURS[settings.flavour](graph, architecture)

    def build(self, notify: Notify) -> ir.Model:
        """Emit everything, reporting each layer."""
        inputs = self._inputs()
        caches = [self._cache(index) for index in range(self.architecture.layers)]
        self.flavour.prepare(inputs)
        x, update = self._embedded(inputs), None
        presents = []
        for index, (past_key, past_value) in enumerate(caches):
            x, update, *present = self._layer(index, x, update, past_key, past_value)
            presents.append(present)
            notify(Event("export", index + 1, self.architecture.layers + 1))
        hidden, _ = self._add_norm(x, update, self.names.final_norm)
        self._logits(hidden)
        for index, present in enumerate(presents):
            for value, part in zip(present, ("key", "value"), strict=True):
                self.graph.output(
                    value, f"present.{index}.{part}", self.graph.dtype, self._cache_shape("total_sequence")
                )
        notify(Event("export", self.architecture.layers + 1, self.architecture.layers + 1))
        return self.graph.model("soco-export")

    def _inputs(self) -> Inputs:
        tokens = self.graph.input("input_ids", INT64, ["batch", "sequence"])
        mask = self.graph.input("attention_mask", INT64, ["batch", "total_sequence"])
        positions = None
        if self.flavour.needs_positions:
            positions = self.graph.input("position_ids", INT64, ["batch", "sequence"])
        return Inputs(tokens, mask, positions)

    def _cache(self, index: int) -> tuple[ir.Value, ir.Value]:
        shape, name = self._cache_shape("past_sequence"), f"past_key_values.{index}"
        key = self.graph.input(f"{name}.key", self.graph.dtype, shape)
        return key, self.graph.input(f"{name}.value", self.graph.dtype, shape)

    def _cache_shape(self, time: str) -> list[int | str]:
        return ["batch", self.architecture.kv_heads, time, self.architecture.head_dim]

    # input_ids ── rows of the table ──(Add ── Gather learned positions ── Add offset ── position_ids)── x
    def _embedded(self, inputs: Inputs) -> ir.Value:
        graph = self.graph
        with graph.scope("embed"):
            x = self.table.rows(inputs.tokens)
            if self.names.positions is None:
                return x
            rows = graph.op("Add", inputs.positions, graph.constant(self.architecture.position_offset))
            return graph.op("Add", x, graph.op("Gather", self._stored(f"{self.names.positions}.weight"), rows))

    def _layer(
        self, index: int, x: ir.Value, update: Update | None, past_key: ir.Value, past_value: ir.Value
    ) -> tuple[ir.Value, Update, ir.Value, ir.Value]:
        """Return (x, its pending update, present key, present value)."""
        prefix = self.names.layer.format(index)
        with self.graph.scope(prefix):
            hidden, x = self._add_norm(x, update, f"{prefix}.{self.names.attention_norm}")
            names = [f"{prefix}.{name}" for name in (self.names.query, self.names.key, self.names.value)]
            query, key, value = self.linears.many(hidden, names)
            query = self._head_norm(query, self.architecture.heads, prefix, self.names.query_norm)
            key = self._head_norm(key, self.architecture.kv_heads, prefix, self.names.key_norm)
            heads = Heads(query, key, value, past_key, past_value)
            output, *present = self.flavour.attend(heads, self.architecture.windows[index])
            update = Update(*self.linears.apart(output, f"{prefix}.{self.names.output}"))
            hidden, x = self._add_norm(x, update, f"{prefix}.{self.names.mlp_norm}")
            return x, self._mlp(hidden, prefix), present[0], present[1]

    # gated:  h ─┬─ gate ── activation ─┬─ Mul ── down        plain:  h ── in ── activation ── out
    #            └─ up ─────────────────┘
    # Between in and out everything is elementwise: a pivoted layer's order is undone in the columns of `out`.
    def _mlp(self, hidden: ir.Value, prefix: str) -> Update:
        names = [f"{prefix}.{name}" for name in self.names.mlp_in]
        order = self.linears.native_order(names)
        first, *gated = self.linears.many(hidden, names, rows=order)
        inner = self._activated(first)
        if gated:
            inner = self.graph.op("Mul", inner, gated[0])
        return Update(*self.linears.apart(inner, f"{prefix}.{self.names.mlp_out}", columns=order))

    # silu: x ─┬─ Sigmoid ─┬─ Mul
    #          └───────────┘
    def _activated(self, x: ir.Value) -> ir.Value:
        if self.architecture.activation == "silu":
            return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))
        op, attributes = ACTIVATIONS[self.architecture.activation]
        return self.graph.op(op, x, **attributes)

    # [b,s,heads·d] ── Reshape [b,s,heads,d] ── norm ── Reshape [b,s,heads·d]
    def _head_norm(self, x: ir.Value, heads: int, prefix: str, name: str | None) -> ir.Value:
        if name is None:
            return x
        graph, head_dim = self.graph, self.architecture.head_dim
        with graph.scope(name):
            split = graph.op("Reshape", x, graph.constant([0, 0, heads, head_dim]))
            normed = self.flavour.norm(split, self._stored(f"{prefix}.{name}.weight"), None)
            return graph.op("Reshape", normed, graph.constant([0, 0, heads * head_dim]))

    def _add_norm(self, x: ir.Value, update: Update | None, name: str) -> tuple[ir.Value, ir.Value]:
        bias = self._stored(f"{name}.bias") if self.architecture.norm.kind == "layer" else None
        return self.flavour.add_norm(x, update, self._stored(f"{name}.weight"), bias)

    # hidden ──(Gather last)── head ──(Cast)── logits
    def _logits(self, hidden: ir.Value) -> None:
        graph = self.graph
        with graph.scope("head"):
            if self.settings.last_token_logits:
                hidden = graph.op("Gather", hidden, graph.constant([-1]), axis=1)
            logits = self.table.product(hidden) if self.architecture.tied else self.linears(hidden, self.names.head)
            if graph.dtype != FLOAT:
                logits = graph.op("Cast", logits, to=FLOAT)
        time = 1 if self.settings.last_token_logits else "sequence"
        graph.output(logits, "logits", FLOAT, ["batch", time, self.architecture.vocab])

    def _stored(self, name: str) -> ir.Value:
        return self.graph.weight(name, self.source.read(name))
