"""The token table: read by rows at the start and, in a model with tied embeddings, multiplied with at the end.

It is stored once, in floats or in blocks; float rows beside a quantised head need two copies, and so do blocks that do
not divide the width, of which there are those alone that `quantize.blocks` gives to the table.
"""

from __future__ import annotations

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.emit.linear import Linears, StoredBlocks
from soco_export.onnx.write.graph import CONTRIB, Graph
from soco_export.onnx.write.matrix import Matrix, Part
from soco_train.numbers.blocks import Grid
from soco_train.settings.rounding import BITS


class TokenTable:
    """Emits lookups in, and products with, one table [vocab, hidden]."""

    def __init__(self, graph: Graph, architecture: Architecture, linears: Linears) -> None:
        self.graph = graph
        self.architecture = architecture
        self.linears = linears
        self.name = f"{architecture.tensors.embed}.weight"
        self._floats: ir.Value | None = None
        self._blocks: StoredBlocks | None = None

    # float:   tokens ── Gather table ── rows
    # blocks:  tokens ── GatherBlockQuantized table ── rows
    def rows(self, tokens: ir.Value) -> ir.Value:
        """Return the rows of `tokens` [batch, sequence], [batch, sequence, hidden]."""
        settings = self.linears.settings
        name = self.architecture.tensors.embed
        kind = settings.table_of(name)
        if kind == "same":
            self._floats = self.graph.weight(self.name, self.linears.read(self.name, None))
            return self.graph.op("Gather", self._floats, tokens)
        grid = Grid(BITS[kind], settings.quantize.table_block(name, self.architecture.hidden), symmetric=True)
        # Symmetric always: ONNX Runtime before 1.32 reads packed zeros of an odd number of blocks wrongly.
        # Gather wants the table as wide as the model: no padding behind the last block.
        shape = (self.architecture.vocab, self.architecture.hidden * grid.bits // 8)
        table = Matrix([Part(self.linears.source.read(self.name))])
        self._blocks = self.linears.store_blocks(self.name, table, grid, shape)
        return self.graph.op(
            f"{CONTRIB}::GatherBlockQuantized",
            self._blocks.packed,
            tokens,
            *self._blocks.parameters,
            bits=grid.bits,
            block_size=grid.block,
            gather_axis=0,
            quantize_axis=1,
        )

    # float:   hidden ── Reshape [b·s,n] ── Gemm tableᵀ ── Reshape [b,s,vocab]
    # blocks:  hidden ── MatMulNBits (table ── Reshape [vocab,blocks,bytes])
    # neither: hidden ── the head's own MatMul
    def product(self, hidden: ir.Value) -> ir.Value:
        """Return hidden · tableᵀ + bias: the logits of a tied head, which may have a bias of its own."""
        logits, bias = self._product(hidden), self.linears.bias(self.architecture.tensors.head, None)
        return logits if bias is None else self.graph.op("Add", logits, bias)

    def _product(self, hidden: ir.Value) -> ir.Value:
        head = self.architecture.tensors.head
        quantized = self.linears.settings.quantizes(head)
        if quantized and self._blocks is not None and self.architecture.hidden % self._blocks.block == 0:
            return self._block_product(hidden, self._blocks)
        if quantized or self._floats is None:
            levels = self.linears.source.levels(f"{head}.weight")
            table = Matrix([Part(self.linears.source.read(self.name), levels=levels)])
            return self.linears.matmul(hidden, f"{head}.weight", table, [head])
        return self._float_product(hidden, self._floats)

    def _block_product(self, hidden: ir.Value, blocks: StoredBlocks) -> ir.Value:
        graph, size = self.graph, blocks.block * blocks.bits // 8
        table = graph.op("Reshape", blocks.packed, graph.constant([self.architecture.vocab, -1, size]))
        return self.linears.block_product(hidden, blocks.with_packed(table))

    def _float_product(self, hidden: ir.Value, table: ir.Value) -> ir.Value:
        graph = self.graph
        flat = graph.op("Reshape", hidden, graph.constant([-1, self.architecture.hidden]))
        product = graph.op("Gemm", flat, table, transB=1)
        sizes = graph.op("Shape", hidden, start=0, end=2)
        shape = graph.op("Concat", sizes, graph.constant([self.architecture.vocab]), axis=0)
        return graph.op("Reshape", product, shape)
