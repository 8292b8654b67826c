"""Perplexity over fixed blocks, the same way for every decoder, and what a model says of each token on the way.

The protocol: the text is cut into windows that do not overlap, nothing is put before them, and the first token of each
is context only. A block whose loss is not finite is an error, never skipped: dropping the worst blocks would be the
quietest way to a good figure.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.decoders.decoder import Decoder, FloatArray, IntArray
from soco_export.evaluate.figures import PerplexityFigures
from soco_export.evaluate.paired import perplexity_interval
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent

_POSITIONS_AT_ONCE = 128
SMALLEST = -1e4  # a logit's distance from the largest; exp of it is 0, and 0 times it, unlike 0 times -inf, is 0

Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Readings:
    """What a model says of each scored token; all [windows, t - 1].

    `loss`: -log p(token) in nats; `entropy`: of the prediction, in nats; `top`: the token it finds likeliest;
    `confidence`: the probability it gives that one.
    """

    loss: Doubles
    entropy: Doubles
    confidence: Doubles
    top: IntArray


def measure_perplexity(decoder: Decoder, blocks: npt.ArrayLike, notify: Notify = silent) -> PerplexityFigures:
    """Score all but the first token of every block. blocks: [n, t] token ids, t ≥ 2.

    Raises DataError, naming the block, if a loss is NaN or infinite.
    """
    return summarise_readings(read_windows(decoder, blocks, notify))


def read_windows(decoder: Decoder, blocks: npt.ArrayLike, notify: Notify = silent) -> Readings:
    """Return what a model says of all but the first token of every block. blocks: [n, t] token ids, t ≥ 2.

    Raises DataError, naming the block, if a loss is NaN or infinite.
    """
    tokens = np.asarray(blocks, dtype=np.int64)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"cannot score blocks of shape {tokens.shape}", fix="give n ≥ 1 blocks of ≥ 2 tokens")
    found: list[Readings] = []
    means: list[float] = []
    for index, block in enumerate(tokens):
        read = read_logits(decoder.logits(block[None])[0, :-1], block[1:])
        if not np.isfinite(read.loss).all():
            raise DataError(
                f"the {decoder.name} model's loss on evaluation block {index} is not finite",
                fix="check the weights for NaN and the dtype for overflow (float16 ends at 65504)",
                where=f"evaluation block {index} of {len(tokens)}, token {int(np.argmin(np.isfinite(read.loss))) + 1}",
            )
        found.append(read)
        means.append(float(read.loss.mean()))
        values = {"perplexity": float(np.exp(np.mean(means)))}
        notify(Event(f"perplexity: {decoder.name}", index + 1, len(tokens), values))
    return Readings(*(np.stack([getattr(read, name) for read in found]) for name in Readings.__annotations__))


def summarise_readings(read: Readings) -> PerplexityFigures:
    """Return the perplexity of a text that was read."""
    means = [float(losses.mean()) for losses in read.loss]
    loss = float(np.mean(means))
    return PerplexityFigures(float(np.exp(loss)), loss, read.loss.size, tuple(means), perplexity_interval(means))


def read_logits(logits: FloatArray, targets: IntArray) -> Readings:
    """Return what a model says of one window's tokens; logits: [n, v], targets: [n] → all [n].

    Works a few positions at a time; exponentials in float32, sums in float64 (relative error about 1e-7).
    """
    n = len(targets)
    read = Readings(np.empty(n), np.empty(n), np.empty(n), np.empty(n, dtype=np.int64))
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(n):
            top, masses, mass = _masses(logits[part])
            below = np.maximum(logits[part] - top, np.float32(SMALLEST))
            read.loss[part] = _losses(logits[part], targets[part], top, mass)
            # H = log Z - Σ p (logit - top), for log p = logit - top - log Z
            read.entropy[part] = np.log(mass) - (masses * below).sum(-1, dtype=np.float64) / mass
            read.confidence[part] = 1 / mass
            read.top[part] = logits[part].argmax(-1)
    return read


def token_losses(logits: FloatArray, targets: IntArray) -> Doubles:
    """Return -log p(target) per position; logits: [n, v], targets: [n] → [n] float64, as read_logits has them."""
    found = np.empty(len(targets), dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for part in _parts(len(targets)):
            top, _, mass = _masses(logits[part])
            found[part] = _losses(logits[part], targets[part], top, mass)
    return found


def _parts(n: int) -> Iterator[slice]:
    return (slice(start, start + _POSITIONS_AT_ONCE) for start in range(0, n, _POSITIONS_AT_ONCE))


def _masses(rows: FloatArray) -> tuple[FloatArray, FloatArray, Doubles]:
    """Return the largest logit [n, 1], exp(logit - largest) [n, v] and the sum of that [n]."""
    top = rows.max(-1, keepdims=True)
    masses = np.exp(rows - top)
    return top, masses, masses.sum(-1, dtype=np.float64)


def _losses(rows: FloatArray, targets: IntArray, top: FloatArray, mass: Doubles) -> Doubles:
    picked = np.take_along_axis(rows, targets[:, None], axis=-1)
    return np.asarray(np.log(mass) + (top.astype(np.float64) - picked)[:, 0])
