"""How far decoding is from the ceiling: one token reads every streamed weight once, so memory bandwidth bounds it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from math import prod
from pathlib import Path

import onnx
import torch
from onnx import helper

from soco_export.bench.figures import Roofline

BUFFER_BYTES = 256 * 2**20  # well beyond the last-level cache
REPEATS = 7
# Of these a step reads some rows only: of a token table, of the cosines and sines of all positions.
TABLE_OPS = {"Gather", "GatherBlockQuantized", "RotaryEmbedding", "GroupQueryAttention"}


def roofline(bytes_per_step: int, bandwidth: float, measured_ms: float) -> Roofline:
    """Hold a measured decode step against bytes / bandwidth."""
    ideal = 1e3 * bytes_per_step / bandwidth
    return Roofline(bytes_per_step, bandwidth, ideal, measured_ms, ideal / measured_ms)


def measure_bandwidth(threads: int, device: str = "cpu") -> float:
    """Return the read bandwidth of `device` in bytes/s: the best of a few sums over a buffer no cache holds."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        buffer = torch.ones(BUFFER_BYTES // 4, dtype=torch.float32, device=device)
        seconds = min(_time_sum(buffer) for _ in range(REPEATS))
    finally:
        torch.set_num_threads(before)
    return BUFFER_BYTES / seconds


def _time_sum(buffer: torch.Tensor) -> float:
    start = time.perf_counter()
    buffer.sum().item()  # .item() also waits for an accelerator
    return time.perf_counter() - start


def bytes_per_decode_step(model: Path, past: int) -> int:
    """Return the bytes one decode step reads: all initialisers but lookup tables, and a cache of `past` tokens.

    A table that a matrix product reads too (tied embeddings) counts; of one that is only looked up, a row is read.
    """
    graph = onnx.load(str(model), load_external_data=False).graph
    readers: dict[str, set[str]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    weights = sum(_bytes(w.data_type, w.dims) for w in graph.initializer if readers.get(w.name, set()) - TABLE_OPS)
    cache = [entry.type.tensor_type for entry in graph.input if entry.name.startswith("past_key_values.")]
    per_token = sum(
        _bytes(entry.elem_type, [entry.shape.dim[1].dim_value, entry.shape.dim[3].dim_value]) for entry in cache
    )
    return weights + past * per_token


def _bytes(data_type: int, dims: Iterable[int]) -> int:
    count = prod(dims)
    if data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
        return (count + 1) // 2
    return int(count * helper.tensor_dtype_to_np_dtype(data_type).itemsize)
