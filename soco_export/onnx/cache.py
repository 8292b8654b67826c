"""Scales of a rounded cache: how large keys and values become over a text, number by number of each head.

GroupQueryAttention stores round(x / scale) of keys after their rotation, and other positions rotate them otherwise. A
number of a key has the scale of the most that any position of the context makes of it: of a pair that turns fast its
length, of one that turns slowly less. Values have the scale of their largest. So nothing of the text is out of reach.

For keys the 16 levels of int4 are too few for that: there a scale is the share of the reach that leaves the least
squared error over the text. The first token counts as much as all others together, for about as much attention goes to
it (arXiv:2309.17453), and its keys are unlike all others.
"""

from __future__ import annotations

import math
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

_LARGEST = {"int8": 127, "int4": 7}  # levels on both sides; there is one more below zero
_SHARES = tuple(share / 20 for share in range(20, 4, -1))  # tried for keys in int4
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
    for index, keys, values in _cached(model, architecture, tokens):
        reach = _reach(keys, architecture.each[index].rope, architecture.context), values.abs()
        largest = torch.stack([each.amax((0, 2)) for each in reach]) / _LARGEST[kind]
        torch.maximum(scales[index], largest, out=scales[index])
    scales.clamp_(min=_SMALLEST)
    if kind == "int4":
        errors = torch.zeros(len(_SHARES), *scales[:, 0].shape)
        for index, keys, _ in _cached(model, architecture, tokens):
            for share, total in zip(_SHARES, errors[:, index], strict=True):
                total += _error(keys, share * scales[index, 0], architecture.each[index].rope)
        scales[:, 0] *= torch.tensor(_SHARES)[errors.argmin(0)]
    return [CacheScales(*(part[None, :, None].numpy() for part in layer)) for layer in scales]


def _cached(
    model: Any, architecture: Architecture, tokens: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """Yield the number of a layer with its keys and values [b, kv_heads, t, head_dim], keys in the graph's order."""
    from transformers import DynamicCache

    for batch in tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1])):
        past = DynamicCache()  # of all positions: one of a model's own with windows keeps the last of them only
        model(input_ids=batch, past_key_values=past, use_cache=True)
        for index, (layer, kept) in enumerate(zip(architecture.each, past.layers, strict=True)):
            order = head_order(layer.rope, architecture.attention.head_dim)
            keys = kept.keys if order is None else kept.keys[..., torch.from_numpy(order)]
            yield index, keys.float(), kept.values.float()


def _reach(keys: torch.Tensor, rope: Rope | None, context: int) -> torch.Tensor:
    """Return how far from 0 each number of rotated keys [..., t, head_dim] gets at any of the `context` positions.

    keys: in the graph's order, of the positions 0 to t - 1.
    """
    sizes = keys.abs()
    if rope is None:
        return sizes
    turning, half = len(rope.frequencies), keys.shape[-1] // 2
    first, second = keys[..., :turning].double(), keys[..., half : half + turning].double()
    frequencies = torch.tensor(rope.frequencies, dtype=torch.float64)
    begin = torch.atan2(second, first) - torch.arange(keys.shape[-2])[:, None] * frequencies
    end = begin + (torch.inf if rope.by_length else (context - 1) * frequencies)
    lengths = torch.hypot(first, second)
    sizes[..., :turning] = lengths * _largest_cosine(begin, end)
    sizes[..., half : half + turning] = lengths * _largest_cosine(begin - math.pi / 2, end - math.pi / 2)
    return sizes


def _largest_cosine(begin: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return the largest |cos| of the angles from `begin` to `end`: 1 where a multiple of π lies between them."""
    passes = (begin / math.pi).floor() < (end / math.pi).floor()
    return torch.where(passes, 1.0, torch.maximum(begin.cos().abs(), end.cos().abs()))


def _error(keys: torch.Tensor, scale: torch.Tensor, rope: Rope | None) -> torch.Tensor:
    """Return the squared error [kv_heads, head_dim] that 4 bits leave of keys [b, kv_heads, t, head_dim].

    scale: [kv_heads, head_dim]. The error of a pair that turns is that of both of its numbers.
    """
    by, largest = scale[:, None], _LARGEST["int4"]
    wrong = ((keys / by).round_().clamp_(-largest - 1, largest).mul_(by) - keys).square_()
    errors = (wrong.sum(2) + (wrong.shape[2] - 2) * wrong[:, :, 0]).sum(0)
    if rope is not None:
        turning, half = len(rope.frequencies), keys.shape[-1] // 2
        both = errors[:, :turning] + errors[:, half : half + turning]
        errors[:, :turning] = errors[:, half : half + turning] = both
    return errors
