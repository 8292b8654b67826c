"""Every form of a Linear, and every way to store its matrices.

A form is a first matrix, which reads the layer's input, and a finish, which turns that product into the output. Layers
that read the same input can therefore share one MatMul (`pack`) whatever their forms are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from soco_export.onnx.graph import CONTRIB, Array, Graph
from soco_export.onnx.quantize import quantize
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.weights import CheckpointWeights

BITS = {"int8": 8, "int4": 4}
Finish = Callable[["Linears", ir.Value, str], ir.Value]
FINISH: dict[str, Finish] = {}


def finish(kind: str) -> Callable[[Finish], Finish]:
    """Register what follows the first matrix of a form."""

    def register(function: Finish) -> Finish:
        FINISH[kind] = function
        return function

    return register


class Linears:
    """Emits the Linears of one checkpoint into one graph and remembers which tensors were used."""

    def __init__(self, graph: Graph, source: CheckpointWeights, settings: ExportSettings) -> None:
        self.graph = graph
        self.source = source
        self.settings = settings

    def __call__(self, x: ir.Value, name: str) -> ir.Value:
        """Return the output of the Linear `name` for the input `x`."""
        return self.many(x, [name])[0]

    def many(self, x: ir.Value, names: Sequence[str]) -> list[ir.Value]:
        """Return the outputs of several Linears that all read `x`."""
        firsts = [self._product(x, names)] if len(names) == 1 else self._products(x, names)
        return [self._finished(first, name) for first, name in zip(firsts, names, strict=True)]

    # unpacked            packed
    #   x                   x
    #   ├─ MatMul W0        │
    #   ├─ MatMul W1      MatMul [W0 W1 W2]
    #   └─ MatMul W2        └─ Split
    def _products(self, x: ir.Value, names: Sequence[str]) -> list[ir.Value]:
        if not self.settings.pack:
            return [self._product(x, [name]) for name in names]
        sizes = [self.source.shapes[f"{name}.weight"][0] for name in names]
        packed = self._product(x, names)
        split = self.graph.ops("Split", packed, self.graph.constant(sizes), outputs=len(names), axis=-1)
        return list(split)

    def _product(self, x: ir.Value, names: Sequence[str]) -> ir.Value:
        label = names[0] if len(names) == 1 else "+".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
        arrays = [self.source.read(f"{name}.weight") for name in names]
        with self.graph.scope(label):
            return self.matmul(x, f"{label}.weight", arrays[0] if len(arrays) == 1 else np.concatenate(arrays))

    def _finished(self, first: ir.Value, name: str) -> ir.Value:
        with self.graph.scope(name):
            return FINISH[self.source.form(name).kind](self, first, name)

    def bias(self, y: ir.Value, name: str) -> ir.Value:
        """Add the bias stored as `name`, if there is one."""
        if name not in self.source:
            return y
        return self.graph.op("Add", y, self.graph.weight(name, self.source.read(name)))

    def matmul(self, x: ir.Value, name: str, weight: Array) -> ir.Value:
        """Return x · weightᵀ for a `weight` [m, n], stored as export.weights says."""
        kept = any(fnmatchcase(name.removesuffix(".weight"), glob) for glob in self.settings.quantize.keep)
        if self.settings.weights == "same" or kept:
            # Stored transposed: MatMul then needs no Transpose at run time.
            return self.graph.op("MatMul", x, self.graph.weight(name, weight.T))
        return self._quantized(x, name, weight, BITS[self.settings.weights])

    def _quantized(self, x: ir.Value, name: str, weight: Array, bits: int) -> ir.Value:
        how = self.settings.quantize
        stored = quantize(weight, bits, how.block, how.symmetric)
        zeros = None if stored.zeros is None else self.graph.stored(f"{name}_zeros", stored.zeros)
        return self.graph.op(
            f"{CONTRIB}::MatMulNBits",
            x,
            self.graph.stored(f"{name}_q{bits}", stored.packed),
            self.graph.weight(f"{name}_scales", stored.scales),
            *([] if zeros is None else [zeros]),
            K=weight.shape[1],
            N=weight.shape[0],
            bits=bits,
            block_size=how.block,
            accuracy_level=how.accuracy_level,
        )


# x ── MatMul W ──(Add bias)── y
@finish("dense")
def _dense(linears: Linears, first: ir.Value, name: str) -> ir.Value:
    return linears.bias(first, f"{name}.bias")


# x ── MatMul down [n,r] ── MatMul up [r,m] ──(Add bias)── y
@finish("stacked")
def _stacked(linears: Linears, first: ir.Value, name: str) -> ir.Value:
    y = linears.matmul(first, f"{name}.up.weight", linears.source.read(f"{name}.up.weight"))
    return linears.bias(y, f"{name}.up.bias")


# x ── MatMul pivot [n,r] ─┬───────────────────────┐
#                          └─ MatMul mix [r,m-r] ──┴─ Concat ── Gather ──(Add bias)── y
@finish("pivoted")
def _pivoted(linears: Linears, first: ir.Value, name: str) -> ir.Value:
    graph, source = linears.graph, linears.source
    rest = linears.matmul(first, f"{name}.mix.weight", source.read(f"{name}.mix.weight"))
    rows = graph.op("Concat", first, rest, axis=-1)
    # `order` says where each row goes; Gather wants where each row comes from.
    place = np.argsort(source.read(f"{name}.order"), kind="stable")
    if not np.array_equal(place, np.arange(len(place))):
        rows = graph.op("Gather", rows, graph.stored(f"{name}.order", place.astype(np.int64)), axis=-1)
    return linears.bias(rows, f"{name}.bias")
