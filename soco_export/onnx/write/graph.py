"""The pen: nodes go into one onnx-ir graph, weights straight into the external data file, one at a time.

Weights are written when the builder meets them, in graph order, so that no second copy of the model exists and the same
input gives the same bytes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from soco_export.onnx.write.matrix import CHUNK, Array, Matrix, Stored
from soco_train.errors import DataError, RecipeError
from soco_train.installed import version

Dim = int | str

OPSET, CONTRIB_OPSET, IR_VERSION = 23, 1, 11
CONTRIB = "com.microsoft"
# Memory-mapped tensors want to start on a page.
ALIGNMENT = 4096


class DataFile:
    """The external data file of one model: appends tensors and says where each of them lies."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("wb")

    def write(self, name: str, array: Stored, dtype: ir.DataType) -> ir.ExternalTensor:
        """Append `array` as `dtype` and return the reference to it; RecipeError if a value does not fit `dtype`."""
        rows = max(1, CHUNK // max(1, array.nbytes // max(1, len(array))))
        pieces = (array[start : start + rows] for start in range(0, len(array), rows))
        return self.stream(name, array.shape, pieces, dtype)

    def stream(
        self, name: str, shape: tuple[int, ...], pieces: Iterable[Array], dtype: ir.DataType
    ) -> ir.ExternalTensor:
        """Append what comes in `pieces`, along the first axis; as `write` else."""
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for piece in pieces:
            cast = np.ascontiguousarray(_cast(name, piece, dtype))
            self._file.write(cast.reshape(-1).view(np.uint8).data)
        return ir.ExternalTensor(
            self.path.name,
            offset,
            self._file.tell() - offset,
            dtype,
            shape=ir.Shape(shape),
            name=name,
            base_dir=self.path.parent,
        )

    def close(self) -> None:
        """Finish the file."""
        self._file.close()


class NoFile(DataFile):
    """A data file that is not written: it only says where each tensor would lie, and never looks at the numbers."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0

    def stream(
        self, name: str, shape: tuple[int, ...], pieces: Iterable[Array], dtype: ir.DataType
    ) -> ir.ExternalTensor:
        """Return the reference that `DataFile.stream` would return."""
        offset = self.size + -self.size % ALIGNMENT
        self.size = offset + int(math.prod(shape) * dtype.itemsize)
        return ir.ExternalTensor(self.path.name, offset, self.size - offset, dtype, shape=ir.Shape(shape), name=name)

    def close(self) -> None:
        """Do nothing."""


class Graph:
    """One graph in the making. `dtype` is the type of activations and of weights that `weight` stores."""

    def __init__(self, data: DataFile, dtype: ir.DataType) -> None:
        self.dtype = dtype
        self._data = data
        self._nodes: list[ir.Node] = []
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._scope: list[str] = []
        self._used: Counter[str] = Counter()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of nodes made inside."""
        self._scope.append(name)
        yield
        self._scope.pop()

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> ir.Value:
        """Declare a graph input."""
        value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, value: ir.Value, name: str, dtype: ir.DataType, shape: Sequence[Dim]) -> None:
        """Declare `value` a graph output called `name`."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, op: str, *inputs: ir.Value | None, **attributes: Any) -> ir.Value:
        """Add a node with one output; `op` may carry a domain, as in `com.microsoft::MatMulNBits`."""
        return self.ops(op, *inputs, outputs=1, **attributes)[0]

    def ops(self, op: str, *inputs: ir.Value | None, outputs: int, **attributes: Any) -> Sequence[ir.Value]:
        """Add a node with several outputs."""
        domain, _, op_type = op.rpartition("::")
        name = self._unique("/".join(["", *self._scope, op_type]))
        node = ir.node(op_type, list(inputs), attributes, domain=domain, num_outputs=outputs, name=name)
        for index, output in enumerate(node.outputs):
            output.name = f"{name}_output_{index}"
        self._nodes.append(node)
        return node.outputs

    def drop(self, node: ir.Node) -> None:
        """Take back a node whose outputs nobody reads, and what only it has read of the initializers."""
        self._nodes.remove(node)
        for index, value in enumerate(list(node.inputs)):
            node.replace_input_with(index, None)
            if value is not None and not value.uses() and value.name in self._initializers:
                del self._initializers[value.name]

    def constant(self, value: Any, dtype: ir.DataType = ir.DataType.INT64) -> ir.Value:
        """Return a small constant, stored once inside the model file."""
        array = np.asarray(value, dtype=dtype.numpy())
        name = f"{dtype.name.lower()}_{array.ndim}d_{'_'.join(map(str, array.ravel().tolist()))}"
        return self._initializer(name, ir.tensor(array, dtype=dtype, name=name))

    def weight(self, name: str, array: Stored) -> ir.Value:
        """Store a weight in the graph's float type; RecipeError if a value does not fit it."""
        return self._initializer(name, self._data.write(name, array, self.dtype))

    # scales (float16) ── Cast ── float32: the runtime folds it when it loads
    def scales(self, name: str, array: Array) -> ir.Value:
        """Store numbers that float16 has in two bytes each; return them in the graph's float type.

        Raises DataError if one is infinite: what it is the scale of is too large to be rounded in blocks.
        """
        if not np.isfinite(array).all():
            raise DataError(
                f"{name}: float16, which ends at 65504, has no scale for blocks of numbers as large",
                fix="store the layer unrounded: export.quantize.keep, or export.weights: same",
                where=name,
            )
        if self.dtype != ir.DataType.FLOAT:
            return self.weight(name, array)
        half = self._initializer(name, self._data.write(name, array, ir.DataType.FLOAT16))
        return self.op("Cast", half, to=self.dtype)

    def transposed(self, name: str, matrix: Matrix) -> ir.Value:
        """Store the transpose of a matrix in the graph's float type."""
        m, n = matrix.shape
        return self._initializer(name, self._data.stream(name, (n, m), matrix.transposed(), self.dtype))

    def streamed(self, name: str, shape: tuple[int, ...], pieces: Iterable[Array]) -> ir.Value:
        """Store bytes that come in pieces along the first axis."""
        return self._initializer(name, self._data.stream(name, shape, pieces, ir.DataType.UINT8))

    def stored(self, name: str, array: Array) -> ir.Value:
        """Store an array in the type that it has."""
        return self._initializer(name, self._data.write(name, array, ir.DataType.from_numpy(array.dtype)))

    def model(self, producer: str) -> ir.Model:
        """Return the finished model; its weights lie in the data file."""
        domains = {node.domain for node in self._nodes}
        opsets = {"": OPSET, **({CONTRIB: CONTRIB_OPSET} if CONTRIB in domains else {})}
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._nodes,
            initializers=list(self._initializers.values()),
            opset_imports=opsets,
            name="decoder",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name=producer)

    def _initializer(self, name: str, tensor: ir.TensorProtocol) -> ir.Value:
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
        return self._initializers[name]

    def _unique(self, name: str) -> str:
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name] - 1}"


def stamp(model: ir.Model, metadata: Mapping[str, str]) -> None:
    """Write into the model's metadata which version of this package made it, and what else is known of it."""
    model.producer_version = version()
    model.metadata_props.update({f"soco_export.{key}": value for key, value in metadata.items()})


def _cast(name: str, array: Array, dtype: ir.DataType) -> Array:
    with np.errstate(over="ignore"):
        cast: Array = array.astype(dtype.numpy(), copy=False)
    if dtype == ir.DataType.FLOAT16 and not np.isfinite(cast).all():
        raise RecipeError(
            f"{name} holds |w| = {np.abs(array).max():.0f}, float16 ends at 65504",
            fix="set export.dtype: bfloat16 or float32",
            where="export.dtype",
        )
    return cast
