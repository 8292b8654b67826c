"""Scales of a cache in int8: how large keys and values become over a text, number by number of each head.

GroupQueryAttention stores round(x / scale) of keys after their rotation. A rotation mixes the two numbers of a pair, at
each position otherwise, so both get the length of the pair: no position can take a key out of reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soco_export.checkpoint.load import load_checkpoint
from soco_export.onnx.describe.architecture import Architecture, Rope
from soco_export.onnx.describe.order import head_order
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.write.matrix import Array

_LARGEST = 127  # of int8, the same on both sides
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
    folder: Path, architecture: Architecture, tokens: torch.Tensor, trust_remote_code: bool = False
) -> list[CacheScales]:
    """Return the scales of every layer of the HF folder over the text `tokens` [b, t]."""
    model = load_checkpoint(folder, trust_remote_code=trust_remote_code)
    shape = architecture.attention
    found = [torch.zeros(2, shape.kv_heads, shape.head_dim) for _ in architecture.each]
    for batch in tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])):
        for total, layer, ends in zip(found, architecture.each, _cached(model, batch), strict=True):
            keys, values = (part.float() for part in ends)
            sizes = torch.stack([_lengths(keys, layer.rope).amax((0, 2)), values.abs().amax((0, 2))])
            torch.maximum(total, sizes, out=total)
    return [CacheScales(*(_scale(part) for part in total)) for total in found]


def _cached(model: Any, batch: torch.Tensor) -> Sequence[tuple[torch.Tensor, torch.Tensor]]:
    """Return keys and values [b, kv_heads, t, head_dim] of each layer, as transformers caches them."""
    past = model(input_ids=batch, use_cache=True).past_key_values
    return [(layer.keys, layer.values) for layer in past.layers]


def _lengths(keys: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Return how far each number of the keys [..., head_dim] can be from 0 at any position, in the graph's order."""
    if rope is None:
        return keys.abs()
    order = head_order(rope, keys.shape[-1])
    ordered = keys if order is None else keys[..., torch.from_numpy(order)]
    first, second = ordered.chunk(2, -1)
    turning = len(rope.frequencies)
    pairs = torch.hypot(first, second)[..., :turning]
    rest = [half[..., turning:].abs() for half in (first, second)]
    return torch.cat([pairs, rest[0], pairs, rest[1]], -1)


def _scale(largest: torch.Tensor) -> Array:
    scales: Array = (largest / _LARGEST).clamp(min=_SMALLEST)[None, :, None].numpy()
    return scales
