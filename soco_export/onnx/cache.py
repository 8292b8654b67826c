"""Scales of a rounded cache: how large keys and values become over a text, number by number of each head.

GroupQueryAttention stores round(x / scale) of keys after their rotation. A rotation mixes the two numbers of a pair, at
each position otherwise, so both have one scale. In int8 that reaches as far as the longest pair of the text, at any
position. The 16 levels of int4 are too few to reach so far: there the scale is that share of it that leaves the least
squared error over the text, and what lies beyond is clipped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soco_export.checkpoint.load import load_checkpoint
from soco_export.onnx.describe.architecture import Architecture, Rope
from soco_export.onnx.describe.order import head_order
from soco_export.onnx.settings import CacheType, ExportSettings
from soco_export.onnx.write.matrix import Array

_LARGEST = {"int8": 127, "int4": 7}  # levels; there is one more below zero
_SHARES = tuple(share / 20 for share in range(20, 4, -1))  # tried in int4; normally distributed numbers want about half
_SMALLEST = 1e-6  # of a scale, for a number that is always 0
_TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class CacheScales:
    """Scales of one layer's keys and values, float32 [1, kv_heads, 1, head_dim], in the order of the graph's heads."""

    key: Array
    value: Array


def blank_scales(architecture: Architecture, settings: ExportSettings) -> list[CacheScales]:
    """Return scales that take as many bytes as those of any text; none where the cache is not rounded."""
    shape = architecture.attention
    ones = np.ones((1, shape.kv_heads, 1, shape.head_dim), np.float32)
    return [CacheScales(ones, ones)] * architecture.layers if settings.cache != "same" else []


@torch.no_grad()
def cache_scales(
    folder: Path, architecture: Architecture, tokens: torch.Tensor, kind: CacheType, trust_remote_code: bool = False
) -> list[CacheScales]:
    """Return the scales of every layer of the HF folder over the text `tokens` [b, t], for a cache of int8 or int4."""
    model = load_checkpoint(folder, trust_remote_code=trust_remote_code)
    shape = architecture.attention
    scales = torch.zeros(architecture.layers, 2, shape.kv_heads, shape.head_dim)
    for index, ends in _cached(model, architecture, tokens):
        rope = architecture.each[index].rope
        scales[index] = torch.maximum(scales[index], _lengths(ends, rope) / _LARGEST[kind])
    scales = scales.clamp(min=_SMALLEST)
    if kind == "int4":
        errors = torch.zeros(len(_SHARES), *scales.shape)
        for index, ends in _cached(model, architecture, tokens):
            for share, total in zip(_SHARES, errors[:, index], strict=True):
                total += _error(ends, share * scales[index, :, None, :, None], architecture.each[index].rope)
        scales = scales * torch.tensor(_SHARES)[errors.argmin(0)]
    return [CacheScales(*(part.clamp(min=_SMALLEST)[None, :, None].numpy() for part in layer)) for layer in scales]


def _cached(model: Any, architecture: Architecture, tokens: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield the number of a layer, and its keys and values [2, b, kv_heads, t, head_dim], keys in the graph's order."""
    for batch in tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])):
        past = model(input_ids=batch, use_cache=True).past_key_values
        for index, (layer, kept) in enumerate(zip(architecture.each, past.layers, strict=True)):
            order = head_order(layer.rope, architecture.attention.head_dim)
            keys = kept.keys if order is None else kept.keys[..., torch.from_numpy(order)]
            yield index, torch.stack([keys.float(), kept.values.float()])


def _lengths(ends: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Return how far each number of keys and values [2, kv_heads, head_dim] can be from 0 at any position."""
    sizes = ends.abs()
    for pair, other in _pairs(sizes[0], rope):
        pair[:] = other[:] = torch.hypot(pair, other)
    return sizes.amax((1, 3))


def _error(ends: torch.Tensor, scale: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Return the squared error [2, kv_heads, head_dim] of 4 bits, of a pair's two numbers together."""
    largest = _LARGEST["int4"]
    levels = (ends / scale).round_().clamp_(-largest - 1, largest)
    errors = (levels.mul_(scale).sub_(ends)).square_().sum((1, 3))
    for pair, other in _pairs(errors[0], rope):
        pair[:] = other[:] = pair + other
    return errors


def _pairs(keys: torch.Tensor, rope: Rope | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield views of both numbers of every pair that turns, of `keys` [..., head_dim] in the graph's order."""
    if rope is not None:
        turning, half = len(rope.frequencies), keys.shape[-1] // 2
        yield keys[..., :turning], keys[..., half : half + turning]
