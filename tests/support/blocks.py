"""A weight in the blocks that MatMulNBits reads, and back: what the numbers of an export are held against."""

from __future__ import annotations

import numpy as np

from soco_export.onnx.write.blocks import QuantizedWeight, quantize_rows
from soco_export.onnx.write.matrix import Matrix, Part
from soco_train.numbers.blocks import Grid, nearest


def quantize(weight: np.ndarray, grid: Grid) -> QuantizedWeight:
    pieces = list(quantize_rows(Matrix([Part(weight)]), grid, nearest))
    packed, scales = (np.concatenate(parts) for parts in zip(*((p.packed, p.scales) for p in pieces), strict=True))
    zeros = None if grid.symmetric else np.concatenate([piece.zeros for piece in pieces if piece.zeros is not None])
    return QuantizedWeight(packed, scales, zeros)


def dequantize(stored: QuantizedWeight, bits: int, width: int) -> np.ndarray:
    levels = unpack_levels(stored.packed, bits).astype(np.float32)
    m, blocks, _ = levels.shape
    zeros: np.ndarray | float = float(2 ** (bits - 1))
    if stored.zeros is not None:
        zeros = unpack_levels(stored.zeros, bits)[:, :blocks, None].astype(np.float32)
    values: np.ndarray = (levels - zeros) * stored.scales[..., None]
    return values.reshape(m, -1)[:, :width]


def unpack_levels(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
