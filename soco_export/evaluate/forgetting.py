"""What a compressed model forgets that its perplexity hides: by kind of token, by text, and in what it writes; purely.

A mean loss can stand still while rare words, sure answers or the ends of long texts pay (arXiv 2110.08419 finds that of
compressed models out of their domain, arXiv 2407.09141 of answers that flip both ways). Both models have read the same
tokens, so that each figure is of pairs, and its interval comes from whole windows drawn again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.bootstrap import pooled_intervals
from soco_export.evaluate.decoders.decoder import IntArray
from soco_export.evaluate.figures import DomainFigures, ForgettingFigures, GenerationFigures, Tokens
from soco_export.evaluate.paired import perplexity_interval
from soco_export.evaluate.perplexity import Doubles, Readings

_KINDS = 10  # tenths of the tokens
CONFIDENCES = 15  # bins of the calibration error, as Guo et al. 2017 have it
GRAM = 4  # tokens that make a repetition (Welleck et al. 2019, seq-rep-4)


def compare_readings(
    dense: Readings,
    other: Readings,
    blocks: npt.ArrayLike,
    domains: Sequence[str],
    generation: GenerationFigures | None = None,
) -> ForgettingFigures:
    """Compare what two models say of the same blocks [n, t]; `domains`: which text each block is of, [n]."""
    targets = np.asarray(blocks)[:, 1:]
    before, after = dense.top == targets, other.top == targets
    errors = calibration_error(dense.confidence, before), calibration_error(other.confidence, after)
    places = np.broadcast_to(np.arange(1, targets.shape[1] + 1), targets.shape)
    frequency = by_kind(occurrences(targets), dense.loss, other.loss)
    return ForgettingFigures(
        tokens=targets.size,
        accuracy_dense=float(before.mean()),
        accuracy_compressed=float(after.mean()),
        lost=float((before & ~after).mean()),
        gained=float((~before & after).mean()),
        agreement=float((dense.top == other.top).mean()),
        ece_dense=errors[0],
        ece_compressed=errors[1],
        ece_increase=errors[1] - errors[0],
        rare_loss=frequency[0].added,
        frequency=frequency,
        entropy=by_kind(dense.entropy, dense.loss, other.loss),
        position=by_kind(places, dense.loss, other.loss),
        domains=by_domain(domains, dense.loss, other.loss),
        generation=generation,
    )


def occurrences(tokens: IntArray) -> IntArray:
    """Return how often each token occurs among all of them; any shape."""
    _, place, counts = np.unique(tokens, return_inverse=True, return_counts=True)
    return np.asarray(counts[place].reshape(tokens.shape))


def by_kind(key: Doubles | IntArray, dense: Doubles, other: Doubles) -> tuple[Tokens, ...]:
    """Return the mean losses of tenths of the tokens by `key`, the smallest first; all arrays [windows, n].

    Tokens with the same key stay together, so that there may be fewer than ten kinds, of different sizes.
    """
    last = np.unique(np.quantile(key, np.arange(1, _KINDS + 1) / _KINDS, method="higher"))  # the largest key of each
    kind = np.searchsorted(last, key)
    counts, one, two = (_per_window(kind, weights, len(last)) for weights in (np.ones_like(dense), dense, other))
    intervals = pooled_intervals(two - one, counts) if len(counts) > 1 else [None] * len(last)
    return tuple(
        Tokens(
            low=float(key[kind == index].min()),
            high=float(last[index]),
            tokens=int(counts[:, index].sum()),
            dense=float(one[:, index].sum() / counts[:, index].sum()),
            compressed=float(two[:, index].sum() / counts[:, index].sum()),
            interval=intervals[index],
        )
        for index in range(len(last))
    )


def _per_window(kind: npt.NDArray[np.intp], weights: Doubles, kinds: int) -> Doubles:
    """Return the sums of `weights` by window and kind, [windows, kinds]."""
    cells = kind + kinds * np.arange(len(kind))[:, None]
    sums = np.bincount(cells.ravel(), weights.ravel(), minlength=kinds * len(kind))
    return np.asarray(sums.reshape(len(kind), kinds))


def by_domain(domains: Sequence[str], dense: Doubles, other: Doubles) -> Mapping[str, DomainFigures]:
    """Return perplexities of each text; `domains`: of each window, [windows]; losses [windows, n]."""
    found = {}
    for name in dict.fromkeys(domains):
        chosen = np.array([domain == name for domain in domains])
        one, two = dense[chosen].mean(1), other[chosen].mean(1)
        values = float(np.exp(one.mean())), float(np.exp(two.mean()))
        ratio = float(np.exp((two - one).mean()))
        found[name] = DomainFigures(dense[chosen].size, *values, ratio, perplexity_interval(list(two - one)))
    return found


def calibration_error(confidence: Doubles, right: npt.NDArray[np.bool_]) -> float:
    """Return the expected calibration error: the mean distance of confidence from accuracy over bins of equal width."""
    bins = np.minimum((confidence * CONFIDENCES).astype(np.int64), CONFIDENCES - 1).ravel()
    gaps = np.bincount(bins, confidence.ravel() - right.ravel(), minlength=CONFIDENCES)
    return float(np.abs(gaps).sum() / confidence.size)


def compare_texts(dense: Sequence[IntArray], other: Sequence[IntArray]) -> GenerationFigures | None:
    """Compare two models' greedy continuations of the same prompts; None without any."""
    if not dense:
        return None
    kept = [int(np.argmin(np.append(one == two, False))) for one, two in zip(dense, other, strict=True)]
    repeated = [float(np.mean([repetition(text) for text in texts])) for texts in (dense, other)]
    return GenerationFigures(
        len(dense), len(dense[0]), float(np.mean(kept)), repeated[0], repeated[1], repeated[1] - repeated[0]
    )


def repetition(tokens: IntArray) -> float:
    """Return the share of a text's 4-grams that have occurred in it before; 0 for fewer than two."""
    if len(tokens) <= GRAM:
        return 0.0
    grams = np.lib.stride_tricks.sliding_window_view(tokens, GRAM)
    return 1 - len(np.unique(grams, axis=0)) / len(grams)
