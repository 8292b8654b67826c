"""Perplexity over fixed blocks, the same way for every decoder.

The protocol: the text is cut into windows that do not overlap, nothing is put before them, and the first token of each
is context only. A block whose loss is not finite is an error, never skipped: dropping the worst blocks would be the
quietest way to a good figure.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.decoder import Decoder, FloatArray, IntArray
from soco_export.evaluate.figures import PerplexityFigures
from soco_export.evaluate.paired import perplexity_interval
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent

_POSITIONS_AT_ONCE = 128


def measure_perplexity(decoder: Decoder, blocks: npt.ArrayLike, notify: Notify = silent) -> PerplexityFigures:
    """Score all but the first token of every block. blocks: [n, t] token ids, t ≥ 2.

    Raises DataError, naming the block, if a loss is NaN or infinite.
    """
    tokens = np.asarray(blocks, dtype=np.int64)
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise DataError(f"cannot score blocks of shape {tokens.shape}", fix="give n ≥ 1 blocks of ≥ 2 tokens")
    means: list[float] = []
    for index, block in enumerate(tokens):
        losses = token_losses(decoder.logits(block[None])[0, :-1], block[1:])
        if not np.isfinite(losses).all():
            raise DataError(
                f"the {decoder.name} model's loss on evaluation block {index} is not finite",
                fix="check the weights for NaN and the dtype for overflow (float16 ends at 65504)",
                where=f"evaluation block {index} of {len(tokens)}, token {int(np.argmin(np.isfinite(losses))) + 1}",
            )
        means.append(float(losses.mean()))
        notify(
            Event(f"perplexity: {decoder.name}", index + 1, len(tokens), {"perplexity": float(np.exp(np.mean(means)))})
        )
    loss, scored = float(np.mean(means)), len(tokens) * (tokens.shape[1] - 1)
    return PerplexityFigures(float(np.exp(loss)), loss, scored, tuple(means), perplexity_interval(means))


def token_losses(logits: FloatArray, targets: IntArray) -> npt.NDArray[np.float64]:
    """Return -log p(target) per position; logits: [n, v], targets: [n] → [n] float64.

    Works a few positions at a time; exponentials in float32, sums in float64 (relative error about 1e-7).
    """
    found = np.empty(len(targets), dtype=np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        for start in range(0, len(targets), _POSITIONS_AT_ONCE):
            part = slice(start, start + _POSITIONS_AT_ONCE)
            rows = logits[part]
            top = rows.max(-1, keepdims=True)
            mass = np.exp(rows - top).sum(-1, dtype=np.float64)
            picked = np.take_along_axis(rows, targets[part, None], axis=-1)
            found[part] = np.log(mass) + (top.astype(np.float64) - picked)[:, 0]
    return found
