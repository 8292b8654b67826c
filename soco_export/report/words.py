"""Verdicts in plain words with units: what a gate asks, what was found, whether that is enough."""

from __future__ import annotations

import math
from collections.abc import Mapping

from soco_export.report.gates import State, Verdict
from soco_export.report.rendering import number, percent

# gate → what its figure is, and its unit ("%": a share; "×": a ratio to the dense model)
PLAIN: Mapping[str, tuple[str, str]] = {
    "max_export_kl": ("the export's distance from the checkpoint (mean KL)", "nats"),
    "max_logit_difference": ("the largest change of a logit by the export", ""),
    "min_token_agreement": ("same most likely token after the export", "%"),
    "min_greedy_agreement": ("greedy text kept by the export", "%"),
    "max_compression_kl": ("distance from the dense model (mean KL)", "nats"),
    "max_ppl_ratio": ("perplexity beside the dense model", "×"),
    "min_task_recovery": ("accuracy kept on the worst task", "%"),
    "max_domain_ratio": ("perplexity beside the dense model on the worst text", "×"),
    "max_rare_loss": ("loss added on the rarest tenth of the tokens", "nats"),
    "max_lost_tokens": ("next tokens that were right and are wrong", "%"),
    "max_ece_increase": ("growth of the calibration error", "%"),
    "max_repetition_increase": ("growth of repetition in greedy text", "%"),
    "max_bytes_ratio": ("bytes on disk beside the dense model", "×"),
    "max_memory_ratio": ("peak memory beside the dense model", "×"),
    "min_decode_speedup": ("decode speed beside the dense model", "×"),
    "min_prefill_speedup": ("prefill speed beside the dense model", "×"),
}
_SHOWN: Mapping[State, str] = {"passed": "ok    ", "inconclusive": "unsure", "failed": "FAILED"}
SIGNS: Mapping[State, str] = {"passed": "✓", "inconclusive": "?", "failed": "✗"}


def verdict_words(verdict: Verdict) -> str:
    """Return "perplexity beside the dense model: 1.045 ×, at most 1.15 ×", and why it was not decided or failed."""
    if verdict.name not in PLAIN:
        return verdict.message
    what, unit = PLAIN[verdict.name]
    limit = f"{'at most' if verdict.name.startswith('max') else 'at least'} {_with_unit(verdict.threshold, unit)}"
    if verdict.figure is None:
        return f"{what}: not measured ({limit} is asked)"
    if math.isnan(verdict.figure):
        return f"{what}: no number ({limit} is asked)"
    found = _with_unit(verdict.figure, unit)
    if found == _with_unit(verdict.threshold, unit) and verdict.figure != verdict.threshold:
        found = f"{verdict.figure!r}"
    if verdict.interval is not None:
        found += f" (95 %: {verdict.interval[0]:.3g} to {verdict.interval[1]:.3g})"
    asked = {"passed": limit, "inconclusive": f"too uncertain to say whether {limit}", "failed": f"not {limit}"}
    return f"{what}: {found}, {asked[verdict.state]}"


def verdict_terminal(verdict: Verdict) -> str:
    """Return "ok     max_ppl_ratio: perplexity beside the dense model: 1.045 ×, at most 1.15 ×"."""
    return f"{_SHOWN[verdict.state]} {verdict.name}: {verdict_words(verdict)}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "%":
        return percent(value)
    return f"{number(value)} {unit}".strip()
