"""Puts a decoder together from its description; knows no families.

tokens ── embed ── x ── [ (norm) ── attention ── (norm) ── + ── (norm) ── MLP ── (norm) ── + ] × layers ── norm ── head
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from soco_export.onnx.cache import CacheScales
from soco_export.onnx.describe.architecture import Architecture, Layer
from soco_export.onnx.describe.order import head_order, projection_orders
from soco_export.onnx.emit.attention import FLOAT, INT64, AttentionFlavour, GraphInputs, Heads, Update
from soco_export.onnx.emit.contrib import Contrib
from soco_export.onnx.emit.embedding import TokenTable
from soco_export.onnx.emit.experts import emit_experts
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.emit.mlp import emit_mlp
from soco_export.onnx.emit.norm import Norms
from soco_export.onnx.emit.standard import Standard
from soco_export.onnx.inspect import BATCH, PAST, SEQUENCE, TOTAL
from soco_export.onnx.settings import ExportSettings, Flavour
from soco_export.onnx.source import WeightSource
from soco_export.onnx.write.graph import Graph
from soco_train.events import Event, Notify

_FLAVOURS: dict[Flavour, type[AttentionFlavour]] = {"standard": Standard, "contrib": Contrib}
_CACHE_TYPES = {"int8": ir.DataType.INT8, "int4": ir.DataType.UINT8}  # two numbers of 4 bits share a byte


class DecoderBuilder:
    """Builds one graph from one description and one checkpoint."""

    def __init__(
        self,
        architecture: Architecture,
        source: WeightSource,
        settings: ExportSettings,
        graph: Graph,
        scales: Sequence[CacheScales] = (),
    ) -> None:
        self.architecture = architecture
        self.scales = scales
        self.cache_type = _CACHE_TYPES.get(settings.cache, graph.dtype)
        self.tensors = architecture.tensors
        self.source = source
        self.settings = settings
        self.graph = graph
        self.linears = Linears(graph, source, settings)
        self.norms = Norms(graph, architecture, source)
        self.table = TokenTable(graph, architecture, self.linears)
        self.flavour = _FLAVOURS[settings.flavour](graph, architecture, self.norms, settings.cache)

    def build(self, notify: Notify) -> ir.Model:
        """Emit everything, reporting each layer."""
        inputs = self._inputs()
        caches = [self._cache(index, layer) for index, layer in enumerate(self.architecture.each)]
        self.flavour.prepare(inputs)
        x, update = self._embedded(inputs), None
        presents = []
        for index, cache in enumerate(caches):
            x, update, *present = self._layer(index, x, update, cache)
            presents.append(present)
            notify(Event("export", index + 1, self.architecture.layers + 1))
        hidden, _ = self._entered(x, update, self.tensors.final_norm)
        self._logits(hidden)
        for index, (layer, present) in enumerate(zip(self.architecture.each, presents, strict=True)):
            for value, (part, shape) in zip(present, self._cache_shapes(layer, TOTAL).items(), strict=True):
                self.graph.output(value, f"present.{index}.{part}", self.cache_type, shape)
        notify(Event("export", self.architecture.layers + 1, self.architecture.layers + 1))
        return self.graph.model("soco-export")

    def _inputs(self) -> GraphInputs:
        tokens = self.graph.input("input_ids", INT64, [BATCH, SEQUENCE])
        mask = self.graph.input("attention_mask", INT64, [BATCH, TOTAL])
        positions = None
        if self.flavour.needs_positions:
            positions = self.graph.input("position_ids", INT64, [BATCH, SEQUENCE])
        return GraphInputs(tokens, mask, positions)

    def _cache(self, index: int, layer: Layer) -> tuple[ir.Value, ir.Value]:
        shapes, name = self._cache_shapes(layer, PAST), f"past_key_values.{index}"
        key = self.graph.input(f"{name}.key", self.cache_type, shapes["key"])
        return key, self.graph.input(f"{name}.value", self.cache_type, shapes["value"])

    def _cache_shapes(self, layer: Layer, time: str) -> dict[str, list[int | str]]:
        shape = self.architecture.attention
        sizes = {"key": shape.head_dim, "value": self.architecture.value_size(layer)}
        together = 2 if self.settings.cache == "int4" else 1
        return {part: [BATCH, shape.kv_heads, time, -(-size // together)] for part, size in sizes.items()}

    # input_ids ── rows of the table (── Mul scale)(── Add ── Gather learned positions ── Add offset)(── norm) ── x
    def _embedded(self, inputs: GraphInputs) -> ir.Value:
        graph, tensors = self.graph, self.tensors
        with graph.scope("embed"):
            x = self._scaled(self.table.rows(inputs.tokens), self.architecture.scales.embedding)
            if tensors.positions is not None:
                rows = graph.op("Add", inputs.positions, graph.constant(tensors.position_offset))
                stored = graph.weight(f"{tensors.positions}.weight", self.source.read(f"{tensors.positions}.weight"))
                x = graph.op("Add", x, graph.op("Gather", stored, rows))
            return x if tensors.embedding_norm is None else self._normed(x, tensors.embedding_norm)

    # in turn:   x ── + update ── (norm) ── attention ── (norm) ── + ── (norm) ── MLP ── (norm) ── update of the next
    # parallel:  x ── + update ─┬─ norm ── attention ─┬─ + ── update of the next
    #                           └─(norm)── MLP ───────┘
    def _layer(
        self, index: int, x: ir.Value, update: Update | None, cache: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, Update, ir.Value, ir.Value]:
        """Return (x, its pending update, present key, present value)."""
        prefix, residual = self.tensors.layer.format(index), self.architecture.residual
        with self.graph.scope(prefix):
            hidden, x = self._entered(x, update, residual.before_attention, prefix)
            output, key, value = self._attention(hidden, prefix, index, cache)
            attended = self._left(
                Update(*self.linears.apart(output, f"{prefix}.{self.architecture.attention.output}")),
                residual.after_attention,
                prefix,
            )
            if not residual.parallel:
                hidden, x = self._entered(x, attended, residual.before_mlp, prefix)
            elif residual.before_mlp is not None:
                hidden = self._normed(x, f"{prefix}.{residual.before_mlp}")
            update = self._left(self._fed(hidden, prefix, self.architecture.each[index]), residual.after_mlp, prefix)
            if residual.parallel:
                both = self.graph.op("Add", self.flavour.complete(attended), update.value)
                update = Update(both, update.bias)
            return x, update, key, value

    def _fed(self, hidden: ir.Value, prefix: str, layer: Layer) -> Update:
        """Return what the MLP, or the experts in its place, make of `hidden`."""
        if not layer.mixture:
            return Update(*emit_mlp(self.linears, self.architecture.mlp, hidden, prefix))
        assert self.architecture.experts is not None
        return Update(emit_experts(self.linears, self.architecture.experts, hidden, prefix), None)

    # hidden ── projections (── Clip)(── norm) ── rotation (── norm) ── attention
    def _attention(
        self, hidden: ir.Value, prefix: str, index: int, cache: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value, ir.Value]:
        layer = self.architecture.each[index]
        query, key, value = self._projected(hidden, prefix, layer)
        norm = self.architecture.attention.norm
        if norm is not None and not norm.rotated:
            query, key = self._head_norms(query, key, prefix, layer)
        query, key = self.flavour.turn(query, key, layer.rope)
        if norm is not None and norm.rotated:
            query, key = self._head_norms(query, key, prefix, layer)
        heads = Heads(query, key, value, *cache, self._sinks(prefix), self._scales(index))
        return self.flavour.attend(heads, layer)

    def _scales(self, index: int) -> tuple[ir.Value, ir.Value] | None:
        if not self.scales:
            return None
        found, prefix = self.scales[index], f"past_key_values.{index}"
        return self.graph.stored(f"{prefix}.key.scale", found.key), self.graph.stored(
            f"{prefix}.value.scale", found.value
        )

    def _sinks(self, prefix: str) -> ir.Value | None:
        name = self.architecture.attention.sinks
        stored = f"{prefix}.{name}"
        return None if name is None else self.graph.weight(stored, self.source.read(stored))

    # fused:  hidden ── one projection ── Split ── query, key, value
    def _projected(self, hidden: ir.Value, prefix: str, layer: Layer) -> list[ir.Value]:
        graph, shape = self.graph, self.architecture.attention
        names = [f"{prefix}.{name}" for name in shape.inputs]
        parts = self.linears.many(hidden, names, projection_orders(shape, layer))
        if len(names) == 1:
            parts = list(graph.ops("Split", parts[0], graph.constant(list(shape.sizes)), outputs=3, axis=-1))
        if shape.clip is None:
            return parts
        ends = [graph.constant(end, graph.dtype) for end in (-shape.clip, shape.clip)]
        return [graph.op("Clip", part, *ends) for part in parts]

    def _head_norms(self, query: ir.Value, key: ir.Value, prefix: str, layer: Layer) -> tuple[ir.Value, ir.Value]:
        shape, order = self.architecture.attention, head_order(layer.rope, self.architecture.attention.head_dim)
        assert shape.norm is not None
        query = self.norms.heads(query, shape.heads, prefix, shape.norm.query, order)
        return query, self.norms.heads(key, shape.kv_heads, prefix, shape.norm.key, order)

    def _entered(
        self, x: ir.Value, update: Update | None, name: str | None, prefix: str | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """Return (what the sublayer reads, x + update): normalised where there is a norm of that `name`."""
        if name is None:
            total = self.flavour.add(x, update)
            return total, total
        parameters = self._parameters(name if prefix is None else f"{prefix}.{name}")
        return self.flavour.add_norm(x, update, parameters, self.architecture.norm)

    def _left(self, update: Update, name: str | None, prefix: str) -> Update:
        """Return what a sublayer adds: normalised, scaled."""
        scale = self.architecture.residual.scale
        if name is None and scale == 1:
            return update
        value = self.flavour.complete(update)
        if name is not None:
            value = self._normed(value, f"{prefix}.{name}")
        return Update(self._scaled(value, scale), None)

    def _normed(self, x: ir.Value, name: str) -> ir.Value:
        return self.norms.apply(x, self._parameters(name), self.architecture.norm)

    def _parameters(self, name: str) -> tuple[ir.Value, ir.Value | None]:
        return self.norms.parameters(name, self.architecture.norm, self.architecture.hidden)

    def _scaled(self, x: ir.Value, factor: float) -> ir.Value:
        return x if factor == 1 else self.graph.op("Mul", x, self.graph.constant(factor, self.graph.dtype))

    # hidden ──(Gather last)(── Mul scale)── head ──(Cast)(── Div cap ── Tanh ── Mul cap)── logits
    def _logits(self, hidden: ir.Value) -> None:
        graph, tensors, scales = self.graph, self.tensors, self.architecture.scales
        with graph.scope("head"):
            if self.settings.last_token_logits:
                hidden = graph.op("Gather", hidden, graph.constant([-1]), axis=1)
            hidden = self._scaled(hidden, scales.logits)
            logits = self.table.product(hidden) if self.architecture.tied else self.linears(hidden, tensors.head)
            if graph.dtype != FLOAT:
                logits = graph.op("Cast", logits, to=FLOAT)
            if scales.cap is not None:
                cap = graph.constant(scales.cap, FLOAT)
                logits = graph.op("Mul", graph.op("Tanh", graph.op("Div", logits, cap)), cap)
        time = 1 if self.settings.last_token_logits else SEQUENCE
        graph.output(logits, "logits", FLOAT, [BATCH, time, self.architecture.vocab])
