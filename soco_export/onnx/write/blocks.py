"""Block-quantised weights in the layout of com.microsoft MatMulNBits: one scale per `block` inputs of each row.

w ≈ (q - zero) · scale        q in 0 … 2^bits - 1, the first of a byte in its lowest bits
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from soco_export.onnx.write.matrix import CHUNK, Array, Matrix, Part
from soco_train.numbers.blocks import Grid, Levels, nearest

RoundRows = Callable[[torch.Tensor, Grid], Levels]


@dataclass(frozen=True)
class QuantizedWeight:
    """As MatMulNBits stores it.

    packed: uint8 [m, blocks, block · bits / 8]; scales: float32 [m, blocks]; zeros: uint8 [m, ⌈blocks · bits / 8⌉] or
    None, which means 2^(bits - 1) everywhere; shape: (m, n) of the float weight.
    """

    packed: Array
    scales: Array
    zeros: Array | None
    bits: int
    block: int
    shape: tuple[int, int]


def quantize(weight: Array, bits: int, block: int, symmetric: bool) -> QuantizedWeight:
    """Round `weight` [m, n] to nearest in `bits` (2, 4 or 8) per block of `block` inputs; the last is padded with 0."""
    pieces = list(quantize_rows(Matrix([Part(weight)]), Grid(bits, block, symmetric), nearest))
    packed, scales = (np.concatenate(parts) for parts in zip(*((p.packed, p.scales) for p in pieces), strict=True))
    zeros = None if symmetric else np.concatenate([piece.zeros for piece in pieces if piece.zeros is not None])
    m, n = weight.shape
    return QuantizedWeight(packed, scales, zeros, bits, block, (m, n))


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
    shape = (len(scales), found.width)
    packed_zeros = None if grid.symmetric else pack_levels(zeros, grid.bits)
    return QuantizedWeight(pack_levels(levels, grid.bits), scales, packed_zeros, grid.bits, grid.block, shape)


def dequantize(weight: QuantizedWeight) -> Array:
    """Return the float32 [m, n] weight that the runtime multiplies with."""
    m, n = weight.shape
    levels = unpack_levels(weight.packed, weight.bits).astype(np.float32)
    blocks = levels.shape[1]
    zeros: Array | float = float(2 ** (weight.bits - 1))
    if weight.zeros is not None:
        zeros = unpack_levels(weight.zeros, weight.bits)[:, :blocks, None].astype(np.float32)
    values: Array = (levels - zeros) * weight.scales[..., None]
    return values.reshape(m, -1)[:, :n]


def pack_levels(levels: Array, bits: int) -> Array:
    """Pack uint8 levels along the last axis; the rest of the last byte is filled with zeros."""
    each = 8 // bits
    if levels.shape[-1] % each:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, -levels.shape[-1] % each)])
    packed: Array = levels[..., 0::each].copy()
    for place in range(1, each):
        packed |= levels[..., place::each] << (place * bits)
    return packed


def unpack_levels(packed: Array, bits: int) -> Array:
    """Undo `pack`, short of cutting off what it filled up with."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).reshape(*packed.shape[:-1], -1)
