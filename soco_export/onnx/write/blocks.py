"""Block-quantised weights in the layout of com.microsoft MatMulNBits: one scale per `block` inputs of each row.

w ≈ (q - zero) · scale        q in 0 … 2^bits - 1, packed low nibble first
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from soco_export.onnx.write.matrix import CHUNK, Array, Matrix, Part


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
    """Round `weight` [m, n] to `bits` (4 or 8) per block of `block` inputs; the last block is padded with zeros."""
    pieces = list(quantize_rows(Matrix([Part(weight)]), bits, block, symmetric))
    packed, scales = (np.concatenate(parts) for parts in zip(*((p.packed, p.scales) for p in pieces), strict=True))
    zeros = None if symmetric else np.concatenate([piece.zeros for piece in pieces if piece.zeros is not None])
    m, n = weight.shape
    return QuantizedWeight(packed, scales, zeros, bits, block, (m, n))


def quantize_rows(matrix: Matrix, bits: int, block: int, symmetric: bool) -> Iterator[QuantizedWeight]:
    """Yield `quantize` of some rows after the other: beside the matrix it needs little memory."""
    for piece in matrix.pieces(CHUNK // 4):  # rounding needs a few copies of its rows
        packed, scales, zeros = _rounded(piece, bits, block, symmetric)
        yield QuantizedWeight(packed, scales, None if symmetric else zeros, bits, block, (len(piece), matrix.shape[1]))


def _rounded(weight: Array, bits: int, block: int, symmetric: bool) -> tuple[Array, Array, Array]:
    """Return (packed levels, scales, packed zeros) of some rows."""
    m, n = weight.shape
    blocks = -(-n // block)
    padded = np.zeros((m, blocks * block), np.float32)
    padded[:, :n] = weight
    grouped = padded.reshape(m, blocks, block)
    scales, zeros = (_symmetric if symmetric else _asymmetric)(grouped, bits)
    grouped /= np.where(scales == 0, 1, scales)[..., None]
    np.rint(grouped, out=grouped)
    grouped += zeros[..., None]
    levels = np.clip(grouped, 0, 2**bits - 1).astype(np.uint8)
    return _pack(levels, bits), scales, _pack(zeros.astype(np.uint8), bits)


def dequantize(weight: QuantizedWeight) -> Array:
    """Return the float32 [m, n] weight that the runtime multiplies with."""
    m, n = weight.shape
    levels = _unpack(weight.packed, weight.bits).astype(np.float32)
    blocks = levels.shape[1]
    zeros: Array | float = float(2 ** (weight.bits - 1))
    if weight.zeros is not None:
        zeros = _unpack(weight.zeros, weight.bits)[:, :blocks, None].astype(np.float32)
    values: Array = (levels - zeros) * weight.scales[..., None]
    return values.reshape(m, -1)[:, :n]


def _symmetric(grouped: Array, bits: int) -> tuple[Array, Array]:
    """Map the value of largest magnitude to the end of the range that has one level more."""
    low, high = grouped.min(axis=-1), grouped.max(axis=-1)
    extreme = np.where(-low > high, low, high)
    half = 2 ** (bits - 1)
    return extreme / -half, np.full_like(extreme, half)


def _asymmetric(grouped: Array, bits: int) -> tuple[Array, Array]:
    """Map [min, max], zero included, to the whole range; zero itself stays exact."""
    top = 2**bits - 1
    low, high = np.minimum(grouped.min(axis=-1), 0), np.maximum(grouped.max(axis=-1), 0)
    scales = (high - low) / top
    zeros = np.rint(-low / np.where(scales == 0, 1, scales))
    return scales, np.clip(zeros, 0, top)


def _pack(levels: Array, bits: int) -> Array:
    """Pack along the last axis; an odd end is filled with zeros."""
    if bits == 8:
        return levels
    if levels.shape[-1] % 2:
        levels = np.pad(levels, [(0, 0)] * (levels.ndim - 1) + [(0, 1)])
    packed: Array = levels[..., 0::2] | (levels[..., 1::2] << 4)
    return packed


def _unpack(packed: Array, bits: int) -> Array:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
