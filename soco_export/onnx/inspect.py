"""What a finished ONNX folder holds: node counts, bytes, and the arithmetic of one token. Reads no weights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.files.names import MODEL_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

CACHE = "past_key_values"
# Sizes that vary, by the names that transformers.js and optimum look for.
BATCH, SEQUENCE, PAST, TOTAL = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"


@dataclass(frozen=True)
class Port:
    """An input or output: element type in ONNX's word, sizes as numbers or names."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Ports:
    """What goes into a decoder graph and what comes out."""

    inputs: dict[str, Port]
    outputs: dict[str, Port]

    @property
    def layers(self) -> int:
        """How many layers have a cache."""
        return sum(name.startswith(CACHE) and name.endswith(".key") for name in self.inputs)

    @property
    def kv_heads(self) -> int:
        """Heads of the cache, [batch, kv_heads, time, head_dim]."""
        return int(self.inputs[f"{CACHE}.0.key"].shape[1])

    @property
    def head_dim(self) -> int:
        """Size of one head of the cache."""
        return int(self.inputs[f"{CACHE}.0.key"].shape[3])


def read_ports(folder: Path) -> Ports:
    """Return the inputs and outputs of `folder`/model.onnx."""
    import onnx_ir as ir  # here, for the names above are read by who loads no graph

    graph = ir.load(folder / MODEL_FILE).graph
    return Ports(
        {v.name: _port(v) for v in graph.inputs if v.name}, {v.name: _port(v) for v in graph.outputs if v.name}
    )


def _port(value: ir.Value) -> Port:
    sizes = value.shape or ()
    dtype = value.dtype.name if value.dtype else ""
    return Port(dtype, tuple(size if isinstance(size, int) else str(size) for size in sizes))


def cache_bytes(folder: Path) -> int:
    """Return the bytes of keys and values that `folder`/model.onnx keeps of a token, in all layers."""
    import onnx_ir as ir

    entries = [port for name, port in read_ports(folder).inputs.items() if name.startswith(CACHE)]
    return int(sum(ir.DataType[port.dtype].itemsize * int(port.shape[1]) * int(port.shape[3]) for port in entries))


@dataclass(frozen=True)
class GraphSummary:
    """`ops`: nodes by kind; `initializer_bytes`: all weights; `flops_per_token`: 2 · m · n over all weight products.

    `metadata`: what the file says of where it comes from.
    """

    ops: dict[str, int]
    initializer_bytes: int
    flops_per_token: int
    metadata: Mapping[str, str]


def summarise_graph(folder: Path) -> GraphSummary:
    """Summarise `folder`/model.onnx without reading its weights."""
    import onnx_ir as ir

    model = ir.load(folder / MODEL_FILE)
    graph = model.graph
    ops = Counter(node.op_type for node in graph)
    tensors = [value.const_value for value in graph.initializers.values() if value.const_value is not None]
    return GraphSummary(
        ops=dict(sorted(ops.items())),
        initializer_bytes=sum(tensor.nbytes for tensor in tensors),
        flops_per_token=sum(_flops(node) for node in graph),
        metadata=dict(model.metadata_props),
    )


def _flops(node: ir.Node) -> int:
    if node.op_type == "MatMulNBits":
        return 2 * node.attributes["K"].as_int() * node.attributes["N"].as_int()
    if node.op_type not in ("MatMul", "Gemm"):
        return 0
    weight = node.inputs[1]
    if weight is None or weight.const_value is None:
        return 0
    return 2 * int(weight.const_value.size)
