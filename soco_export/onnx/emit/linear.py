"""Every form of a Linear, and every way to store its matrices.

A form is a first matrix, which reads the layer's input, and a finish, which turns that product into the output. Layers
that read the same input can therefore share one MatMul (`pack`) whatever their forms are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import WeightSource
from soco_export.onnx.write.blocks import quantize_rows
from soco_export.onnx.write.graph import CONTRIB, Graph
from soco_export.onnx.write.matrix import Array, Matrix, Order, Part, Stored
from soco_train.errors import RecipeError
from soco_train.numbers.blocks import Grid
from soco_train.settings.rounding import BITS

# Cutting a product copies it. Dense gate above up, 5 to 8 numbers for each input, decode 3 % slower at width 576 in
# int4 and gain nothing at 2048; ranks of both, and q above k above v, at most 3, gain (benchmarks/speed/int4.py).
_CUT_PER_INPUT = 3

Finish = Callable[["Linears", ir.Value, str, Order], ir.Value]
FINISH: dict[str, Finish] = {}


def finish(kind: str) -> Callable[[Finish], Finish]:
    """Register what follows the first matrix of a form."""

    def register(function: Finish) -> Finish:
        FINISH[kind] = function
        return function

    return register


def find_finish(kind: str) -> Finish:
    """Return what follows the first matrix of a form; RecipeError for a form that has no nodes here."""
    if kind not in FINISH:
        raise RecipeError(
            f"layers stored {kind} have no ONNX nodes",
            fix=f"storage: {' or '.join(name for name in FINISH if name != 'dense')}, or --format hf or dense",
            where="recipe: storage",
        )
    return FINISH[kind]


@dataclass(frozen=True)
class StoredBlocks:
    """A weight (m, n) that is in the graph: levels, then scales and perhaps zeros."""

    packed: ir.Value
    parameters: tuple[ir.Value, ...]
    bits: int
    block: int
    shape: tuple[int, int]

    def with_packed(self, packed: ir.Value) -> StoredBlocks:
        """Return the same weight with its levels in another shape."""
        return replace(self, packed=packed)


class Linears:
    """Emits the Linears of one checkpoint into one graph.

    `rows` asks for outputs in another order, `columns` says in which order the inputs come: entry i is what the
    checkpoint has at rows[i] or columns[i]. From one layer to the next an order thus costs nothing at run time.
    """

    def __init__(self, graph: Graph, source: WeightSource, settings: ExportSettings) -> None:
        self.graph = graph
        self.source = source
        self.settings = settings

    def __call__(self, x: ir.Value, name: str) -> ir.Value:
        """Return the output of the Linear `name` for the input `x`."""
        first = self._product(x, [name], [None], None)
        return self._biased(self._finished(first, name, None), name, None)

    def apart(self, x: ir.Value, name: str, columns: Order = None) -> tuple[ir.Value, ir.Value | None]:
        """Return the output of `name` without its bias, and the bias [m], for whoever adds it on the way."""
        return self._finished(self._product(x, [name], [None], columns), name, None), self.bias(name, None)

    def many(self, x: ir.Value, names: Sequence[str], rows: Sequence[Order] = ()) -> list[ir.Value]:
        """Return the outputs of several Linears that all read `x`; `rows`: an order for each."""
        rows = rows or [None] * len(names)
        stored = {(self.settings.weights_of(name), self.settings.quantize.block_of(name)) for name in names}
        alike = len(stored) == 1  # each is stored as it is to be
        if self.settings.pack and len(names) > 1 and alike and self._short(names):
            firsts = self._packed(x, names, rows)
        else:
            firsts = [self._product(x, [name], [order], None) for name, order in zip(names, rows, strict=True)]
        return [
            self._biased(self._finished(first, name, order), name, order)
            for first, name, order in zip(firsts, names, rows, strict=True)
        ]

    def native_order(self, names: Sequence[str]) -> Order:
        """Return the order of the first layer among `names` whose form gives its outputs in another than their own."""
        orders = [f"{name}.{order}" for name in names if (order := self.source.form(name).order)]
        return self.source.read(orders[0])[:] if orders else None

    def _short(self, names: Sequence[str]) -> bool:
        """Whether their first matrices together give few enough numbers that cutting them costs less than a product."""
        shapes = [self.source.shapes[f"{name}.weight"] for name in names]
        return sum(outputs for outputs, _ in shapes) <= _CUT_PER_INPUT * shapes[0][1]

    # unpacked            packed
    #   x                   x
    #   ├─ MatMul W0        │
    #   ├─ MatMul W1      MatMul [W0 W1 W2]
    #   └─ MatMul W2        └─ Split
    def _packed(self, x: ir.Value, names: Sequence[str], rows: Sequence[Order]) -> list[ir.Value]:
        sizes = [self.source.shapes[f"{name}.weight"][0] for name in names]
        packed = self._product(x, names, rows, None)
        return list(self.graph.ops("Split", packed, self.graph.constant(sizes), outputs=len(names), axis=-1))

    def _product(self, x: ir.Value, names: Sequence[str], rows: Sequence[Order], columns: Order) -> ir.Value:
        """Return x times the first matrices of all `names`."""
        label = "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
        # The first matrix of a dense layer is all of it: its rows are the outputs.
        ranks = [self.source.form(name).rank for name in names]
        orders = [None if rank else order for order, rank in zip(rows, ranks, strict=True)]
        parts = [self.part(f"{name}.weight", order, columns) for name, order in zip(names, orders, strict=True)]
        with self.graph.scope(label):
            return self.matmul(x, f"{label}.weight", Matrix(parts, columns), names)

    def _finished(self, first: ir.Value, name: str, rows: Order) -> ir.Value:
        with self.graph.scope(name):
            return find_finish(self.source.form(name).kind)(self, first, name, rows)

    def part(self, name: str, rows: Order, columns: Order = None) -> Part:
        """Return a stored matrix; inputs in another order are other blocks, whose levels are not known."""
        return Part(self.source.read(name), rows, self.source.levels(name) if columns is None else None)

    def read(self, name: str, rows: Order) -> Stored:
        """Return a tensor with its first axis in the order `rows`."""
        array = self.source.read(name)
        return array if rows is None else array[rows]

    def bias(self, name: str, rows: Order) -> ir.Value | None:
        """Return the bias of the Linear `name`, if there is one."""
        stored = f"{name}.{self.source.form(name).bias}"
        return self.graph.weight(stored, self.read(stored, rows)) if stored in self.source else None

    def _biased(self, y: ir.Value, name: str, rows: Order) -> ir.Value:
        bias = self.bias(name, rows)
        with self.graph.scope(name):
            return y if bias is None else self.graph.op("Add", y, bias)

    def matmul(self, x: ir.Value, name: str, weight: Matrix, layers: Sequence[str]) -> ir.Value:
        """Return x · weightᵀ for a `weight` [m, n] of `layers`, stored as `export` says."""
        kind = self.settings.weights_of(layers[0])  # layers that share a product are stored alike
        if kind == "same":
            # Stored transposed: MatMul then needs no Transpose at run time.
            return self.graph.op("MatMul", x, self.graph.transposed(name, weight))
        how = self.settings.quantize
        grid = Grid(BITS[kind], how.block_of(layers[0]), how.symmetric)
        blocks = -(-weight.shape[1] // grid.block)
        shape = (weight.shape[0], blocks, grid.block * grid.bits // 8)
        return self.block_product(x, self.store_blocks(name, weight, grid, shape))

    def store_blocks(self, name: str, weight: Matrix, grid: Grid, shape: tuple[int, ...]) -> StoredBlocks:
        """Store a weight in blocks, its levels in `shape` (whose first axis are the rows), then scales and zeros."""
        (m, n), bits, symmetric = weight.shape, grid.bits, grid.symmetric
        blocks, size = -(-n // grid.block), int(np.prod(shape[1:]))
        rule = self.settings.rounding()
        # Made before the pieces come, so that they do not lie between these in memory.
        scales = np.zeros((m, blocks), np.float32)
        zeros = np.empty((0 if symmetric else m, -(-blocks * bits // 8)), np.uint8)

        def levels() -> Iterator[Array]:
            start = 0
            for piece in quantize_rows(weight, grid, rule.rows):
                stop = start + len(piece.packed)
                scales[start:stop] = piece.scales
                if piece.zeros is not None:
                    zeros[start:stop] = piece.zeros
                start = stop
                # Padding behind the last block is left out where `shape` has no room for it.
                yield piece.packed.reshape(len(piece.packed), -1)[:, :size]

        packed = self.graph.streamed(f"{name}_q{bits}", shape, levels())
        parameters = [self.graph.scales(f"{name}_scales", scales)]
        if not symmetric:
            parameters.append(self.graph.stored(f"{name}_zeros", zeros))
        return StoredBlocks(packed, tuple(parameters), bits, grid.block, weight.shape)

    def block_product(self, x: ir.Value, weight: StoredBlocks) -> ir.Value:
        """Return x · weightᵀ for a weight stored in blocks."""
        m, n = weight.shape
        return self.graph.op(
            f"{CONTRIB}::MatMulNBits",
            x,
            weight.packed,
            *weight.parameters,
            K=n,
            N=m,
            bits=weight.bits,
            block_size=weight.block,
            accuracy_level=self.settings.quantize.accuracy_level,
        )


# x ── MatMul W ── y
@finish("dense")
def _dense(linears: Linears, first: ir.Value, name: str, rows: Order) -> ir.Value:
    return first


# x ── MatMul down [n,r] ── MatMul up [r,m] ── y
@finish("stacked")
def _stacked(linears: Linears, first: ir.Value, name: str, rows: Order) -> ir.Value:
    up = Matrix([linears.part(f"{name}.up.weight", rows)])
    return linears.matmul(first, f"{name}.up.weight", up, [name])


# x ── MatMul rows [n,g·r] ── values of r numbers ── attention ── MatMul columns [h·r,m] ── y      (no zeros, no Gather)
@finish("head-rows")
@finish("head-columns")
def _heads(linears: Linears, first: ir.Value, name: str, rows: Order) -> ir.Value:
    return first


# x ── MatMul pivot [n,r] ─┬───────────────────────┐
#                          └─ MatMul mix [r,m-r] ──┴─ Concat ──(into order)── y
@finish("pivoted")
def _pivoted(linears: Linears, first: ir.Value, name: str, rows: Order) -> ir.Value:
    mix = Matrix([Part(linears.source.read(f"{name}.mix.weight"))])
    rest = linears.matmul(first, f"{name}.mix.weight", mix, [name])
    y = linears.graph.op("Concat", first, rest, axis=-1)
    # `order` says where each entry goes; Gather wants where each output comes from.
    place = np.argsort(linears.source.read(f"{name}.order")[:], kind="stable")
    place = place if rows is None else place[rows]
    return y if np.array_equal(place, np.arange(len(place))) else _into_order(linears, y, name, place)


# float32   y [b,s,m] ── Transpose ── Gather rows of [b,m,s] ── Transpose ── [b,s,m]
# others    y [b,s,m] ── Gather ── [b,s,m]
#
# ONNX Runtime's CPU kernel copies the last axis one number at a time, which for a prompt costs as much as the products;
# rows it copies whole. Half precision is for a GPU, which does not mind.
def _into_order(linears: Linears, y: ir.Value, name: str, place: Array) -> ir.Value:
    graph, indices = linears.graph, linears.graph.stored(f"{name}.order", place.astype(np.int64))
    if linears.settings.dtype != "float32":
        return graph.op("Gather", y, indices, axis=-1)
    across = graph.op("Transpose", y, perm=[0, 2, 1])
    return graph.op("Transpose", graph.op("Gather", across, indices, axis=1), perm=[0, 2, 1])
