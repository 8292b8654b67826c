"""Parity: how far one decoder's logits are from another's, on a prefill and on cached decode steps.

Compression (dense → low-rank) and export (low-rank → ONNX) are measured apart, so a failure says which step lost what.
Each decoder is observed alone and its logits are kept, so two big models never share the memory:

    dense, lowrank = observe(TorchDecoder(a), blocks, settings), observe(TorchDecoder(b), blocks, settings)
    compression = compare_observations(dense, lowrank)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from soco_export.evaluate.decoders.decoder import Decoder, FloatArray, IntArray
from soco_export.evaluate.figures import ParityFigures, StepParity
from soco_export.evaluate.settings import ParitySettings
from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent

_POSITIONS_AT_ONCE = 32  # of vocabulary-wide float64 rows
_Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observation:
    """What one decoder said, block by block. prefill: [t, v] each, decode: [steps, v] each, greedy: [tokens] each.

    prompts: the token ids [t] that each of `greedy` goes on from.
    """

    name: str
    prefill: Sequence[FloatArray]
    decode: Sequence[FloatArray]
    greedy: Sequence[IntArray]
    prompts: Sequence[IntArray] = ()


def observe(
    decoder: Decoder,
    blocks: npt.ArrayLike,
    settings: ParitySettings,
    folder: Path | None = None,
    notify: Notify = silent,
) -> Observation:
    """Run `decoder` over the first blocks: a prefill, then cached steps fed with the block's own next tokens.

    blocks: [n, t] token ids. With a `folder` the logits live in files there rather than in memory.
    Raises DataError if the blocks are too short for one prefilled token and the steps.
    """
    tokens = np.asarray(blocks, dtype=np.int64)
    prompt = _prompt_length(tokens.shape[1], settings)
    prefill: list[FloatArray] = []
    decode: list[FloatArray] = []
    for index, block in enumerate(tokens[: settings.blocks]):
        prefill.append(_keep(decoder.prefill(block[None, :prompt])[0], folder, f"{decoder.name}-prefill-{index}"))
        steps = [decoder.step(block[None, i : i + 1])[0, -1] for i in range(prompt, prompt + settings.decode_steps)]
        decode.append(_keep(np.stack(steps), folder, f"{decoder.name}-decode-{index}"))
        notify(Event(f"parity: {decoder.name}", index + 1, min(len(tokens), settings.blocks)))
    decoder.release()
    # a block is no longer than the model's context, and nor is a prompt with what is made of it
    room = max(1, tokens.shape[1] - settings.greedy_tokens)
    prompts = tokens[: settings.greedy_prompts, : min(prompt, room)]
    greedy = [decoder.generate(ids[None], settings.greedy_tokens)[0] for ids in prompts]
    return Observation(decoder.name, prefill, decode, greedy, list(prompts))


def _prompt_length(block: int, settings: ParitySettings) -> int:
    prompt = min(settings.prompt, block - settings.decode_steps)
    if prompt < 1:
        raise DataError(
            f"blocks of {block} tokens leave no prefill before {settings.decode_steps} decode steps",
            fix="raise evaluation.block or lower validate.parity.decode_steps",
            where="recipe: validate.parity",
        )
    return prompt


def _keep(logits: FloatArray, folder: Path | None, name: str) -> FloatArray:
    if folder is None:
        return logits
    path = folder / f"{name}.npy"
    np.save(path, logits)
    kept: FloatArray = np.load(path, mmap_mode="r")
    return kept


def compare_observations(reference: Observation, candidate: Observation) -> StepParity:
    """Measure the step from `reference` to `candidate`; both must have observed the same blocks.

    Where a graph yields the last token's logits only, its prefill is compared on that token.
    """
    shares = [common_prefix(r, c) / len(r) for r, c in zip(reference.greedy, candidate.greedy, strict=True)]
    return StepParity(
        prefill=_compare_all(reference.prefill, candidate.prefill),
        decode=_compare_all(reference.decode, candidate.decode),
        greedy_agreement=float(np.mean(shares)) if shares else None,
    )


def common_prefix(reference: IntArray, candidate: IntArray) -> int:
    """Return how many leading tokens are equal."""
    different = np.flatnonzero(reference != candidate)
    return int(different[0]) if different.size else len(reference)


def _compare_all(reference: Sequence[FloatArray], candidate: Sequence[FloatArray]) -> ParityFigures:
    pairs = zip(reference, candidate, strict=True)
    return _pool([compare_logits(r[-len(c) :], c[-len(r) :]) for r, c in pairs])


def compare_logits(reference: FloatArray, candidate: FloatArray) -> ParityFigures:
    """Compare two sets of next-token logits, [n, v] each, in float64; n ≥ 1."""
    if reference.shape != candidate.shape or len(reference) == 0:
        raise ValueError(f"logits must agree in shape and not be empty: {reference.shape}, {candidate.shape}")
    chunks = range(0, len(reference), _POSITIONS_AT_ONCE)
    return _pool(
        [_compare_chunk(reference[i : i + _POSITIONS_AT_ONCE], candidate[i : i + _POSITIONS_AT_ONCE]) for i in chunks]
    )


def _compare_chunk(reference: FloatArray, candidate: FloatArray) -> ParityFigures:
    ref, cand = reference.astype(np.float64), candidate.astype(np.float64)
    healthy = _healthy(ref) & _healthy(cand)
    kl = np.where(healthy, _divergence(ref, cand), np.nan)
    # Equal infinities (a masked vocabulary entry, -inf in both) are no difference.
    with np.errstate(invalid="ignore"):
        difference = np.where(healthy, np.where(ref == cand, 0.0, np.abs(ref - cand)).max(-1), np.nan)
    agreement = healthy & (ref.argmax(-1) == cand.argmax(-1))
    return ParityFigures(
        positions=len(ref),
        mean_kl=float(kl.mean()),
        max_kl=float(kl.max()),
        max_logit_difference=float(difference.max()),
        token_agreement=float(agreement.mean()),
    )


def _healthy(logits: _Doubles) -> npt.NDArray[np.bool_]:
    return np.isfinite(logits.max(-1))


def _divergence(reference: _Doubles, candidate: _Doubles) -> _Doubles:
    with np.errstate(invalid="ignore", divide="ignore"):
        log_p, log_q = log_softmax(reference), log_softmax(candidate)
        p = np.exp(log_p)
        return np.maximum(np.where(p > 0, p * (log_p - log_q), 0.0).sum(-1), 0.0)


def log_softmax(logits: _Doubles) -> _Doubles:
    """Return log-probabilities over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def _pool(parts: Sequence[ParityFigures]) -> ParityFigures:
    weights = [part.positions for part in parts]
    return ParityFigures(
        positions=sum(weights),
        mean_kl=float(np.average([part.mean_kl for part in parts], weights=weights)),
        max_kl=float(np.max([part.max_kl for part in parts])),
        max_logit_difference=float(np.max([part.max_logit_difference for part in parts])),
        token_agreement=float(np.average([part.token_agreement for part in parts], weights=weights)),
    )
