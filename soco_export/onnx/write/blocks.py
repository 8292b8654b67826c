"""Block-quantised weights in the layout of com.microsoft MatMulNBits: one scale per `block` inputs of each row.

w ≈ (q - zero) · scale        q in 0 … 2^bits - 1, the first of a byte in its lowest bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from soco_export.onnx.write.matrix import CHUNK, Array, Matrix
from soco_train.numbers.blocks import Grid, Levels

RoundRows = Callable[[torch.Tensor, Grid], Levels]


@dataclass(frozen=True)
class QuantizedWeight:
    """As MatMulNBits stores it.

    packed: uint8 [m, blocks, block · bits / 8]; scales: float32 [m, blocks]; zeros: uint8 [m, ⌈blocks · bits / 8⌉] or
    None, which means 2^(bits - 1) everywhere.
    """

    packed: Array
    scales: Array
    zeros: Array | None


def quantize_rows(matrix: Matrix, grid: Grid, rounded: RoundRows) -> Iterator[QuantizedWeight]:
    """Yield some rows after the other, `rounded` or with known levels; it needs little memory beside the matrix."""
    for part in matrix.parts:
        if part.levels is not None:
            yield stored(part.levels if part.rows is None else part.levels.rows(part.rows), grid)
            continue
        for piece in Matrix([part], matrix.columns).pieces(CHUNK // 4):  # rounding needs a few copies of its rows
            yield stored(rounded(torch.from_numpy(np.ascontiguousarray(piece, np.float32)), grid), grid)


def stored(found: Levels, grid: Grid) -> QuantizedWeight:
    """Return rounded rows in the runtime's layout."""
    levels, zeros = (part.to(torch.uint8).numpy() for part in (found.levels, found.zeros))
    scales: Array = found.scales.float().numpy()
    packed_zeros = None if grid.symmetric else pack_levels(zeros, grid.bits)
    return QuantizedWeight(pack_levels(levels, grid.bits), scales, packed_zeros)


def pack_levels(levels: Array, bits: int) -> Array:
    """Pack uint8 levels along the last axis; the rest of the last byte is filled with zeros."""
    each = 8 // bits
    if levels.shape[-1] % each:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, -levels.shape[-1] % each)])
    packed: Array = levels[..., 0::each].copy()
    for place in range(1, each):
        packed |= levels[..., place::each] << (place * bits)
    return packed
