"""The order of rows in which the graph wants queries and keys, so that one kind of rotation does for all.

The operators turn pairs (i, i + head_dim / 2) of a whole head. A head that turns in part or in neighbouring pairs is
such a head with its numbers in another order and zeros among the frequencies; scores are the same in any
order that queries and keys share.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np

from soco_export.onnx.describe.architecture import Attention, Layer, Rope
from soco_export.onnx.write.matrix import Array, Order


def head_order(rope: Rope | None, head_dim: int) -> Order:
    """Return which number of a stored head [head_dim] comes at each place, None: they stay."""
    if rope is None or (2 * len(rope.frequencies) == head_dim and not rope.interleaved):
        return None
    turning, rest = np.arange(2 * len(rope.frequencies)), np.arange(2 * len(rope.frequencies), head_dim)
    pairs = turning.reshape(-1, 2).T if rope.interleaved else turning.reshape(2, -1)
    return np.concatenate([pairs[0], rest[: len(rest) // 2], pairs[1], rest[len(rest) // 2 :]])


def padded(values: tuple[float, ...], head_dim: int, rest: float = 0.0) -> Array:
    """Return a value for each pair of a whole head, float32 [head_dim / 2]; those that do not turn have `rest`."""
    return np.array([*values, *[rest] * (head_dim // 2 - len(values))], np.float32)


def projection_orders(attention: Attention, layer: Layer) -> list[Order]:
    """Return the order of outputs of each of `attention.inputs`; a fused one becomes [queries, keys, values].

    Of values of fewer numbers the first of each head are there.
    """
    turned = head_order(layer.rope, attention.head_dim)
    rows = stored_rows(attention)
    if turned is not None:
        rows = [rows[0][:, turned], rows[1][:, turned], rows[2]]
    if len(attention.inputs) == 1:
        fused = np.concatenate([part.ravel() for part in rows])
        return [None if np.array_equal(fused, np.arange(len(fused))) else fused]
    orders: list[Order] = [None if turned is None else part.ravel() for part in rows[:2]]
    return [*orders, None if layer.values is None else rows[2][:, : layer.values].ravel()]


def stored_rows(attention: Attention) -> list[Array]:
    """Return [heads, head_dim], [kv_heads, head_dim] twice: in which row of its projection each number is stored."""
    size, counts = attention.head_dim, (attention.heads, attention.kv_heads, attention.kv_heads)
    if len(attention.inputs) > 1:
        return [np.arange(count * size).reshape(count, size) for count in counts]
    # every group: its share of query heads, of key heads, of value heads
    shares = [count // attention.groups for count in counts]
    grouped = np.arange(sum(counts) * size).reshape(attention.groups, sum(shares), size)
    edges = np.cumsum([0, *shares])
    return [grouped[:, start:stop].reshape(-1, size) for start, stop in pairwise(edges)]
