"""Results → tables of what was forgotten: losses by kind of token and by text, and how predictions changed."""

from __future__ import annotations

from collections.abc import Iterator

from soco_export.evaluate.figures import ForgettingFigures, Tokens
from soco_export.report.rendering import Row, Table, number, percent, ratio_text

_KINDS = ("tokens", "count", "dense", "this model", "added")
PREDICTIONS = ("", "dense", "this model", "change")


def kinds_table(found: ForgettingFigures | None) -> Table | None:
    """Return the losses at both ends of what tokens are sorted by, and on each text."""
    if found is None:
        return None
    note = (
        "Mean loss in nats a token; the ends of what the picture shows whole. Entropy: of the dense model's "
        "prediction. In brackets 95 % intervals over windows."
    )
    return Table("What was forgotten", _KINDS, tuple(_kinds(found)), note)


def _kinds(found: ForgettingFigures) -> Iterator[Row]:
    rare, common = found.frequency[0], found.frequency[-1]
    yield _row(f"rarest ({_span(rare, 'once', ' times')})", rare)
    yield _row(f"commonest ({_span(common, 'once', ' times')})", common)
    sure, unsure = found.entropy[0], found.entropy[-1]
    yield _row(f"dense surest (entropy to {sure.high:.2g} nats)", sure)
    yield _row(f"dense least sure (from {unsure.low:.2g} nats)", unsure)
    first, last = found.position[0], found.position[-1]
    yield _row(f"start of a window (to token {first.high:.0f})", first)
    yield _row(f"end of a window (from token {last.low:.0f})", last)


def _span(kind: Tokens, one: str, unit: str) -> str:
    if kind.high == 1:
        return one
    return f"{kind.high:.0f}{unit}" if kind.low == kind.high else f"{kind.low:.0f} to {kind.high:.0f}{unit}"


def _row(name: str, kind: Tokens) -> Row:
    ends = f" ({kind.interval[0]:.3f} to {kind.interval[1]:.3f})" if kind.interval else ""
    return name, number(kind.tokens), f"{kind.dense:.3f}", f"{kind.compressed:.3f}", f"{kind.added:+.3f}{ends}"


def domains_table(found: ForgettingFigures | None) -> Table | None:
    """Return perplexity on each evaluation text; None for a single text, whose perplexity is the run's."""
    if found is None or len(found.domains) < 2:
        return None
    rows = [
        (name, number(one.tokens), number(one.dense), number(one.compressed), ratio_text(one.ratio, one.interval))
        for name, one in found.domains.items()
    ]
    return Table("Perplexity by text", ("text", "tokens", "dense", "this model", "ratio"), tuple(rows))


def predictions_table(found: ForgettingFigures | None) -> Table | None:
    """Return how often the next token is right, how honest the confidence is, and how greedy text fares."""
    if found is None:
        return None
    flips = f"lost {percent(found.lost)}, gained {percent(found.gained)}"
    rows: list[Row] = [
        ("next token right", percent(found.accuracy_dense), percent(found.accuracy_compressed), flips),
        ("calibration error", percent(found.ece_dense), percent(found.ece_compressed), _points(found.ece_increase)),
    ]
    note = f"Over {found.tokens:,} tokens, of which {percent(found.agreement)} have the same likeliest next token. "
    note += "Calibration error: how far the probability of the likeliest token is from how often it is right."
    if text := found.generation:
        change = _points(text.repetition_increase)
        rows.append(("repeated 4-grams in greedy text", percent(text.dense), percent(text.compressed), change))
        note += f" Greedy text: {text.prompts} × {text.tokens} tokens, on average {number(text.kept)} the same."
    return Table("Predictions", PREDICTIONS, tuple(rows), note)


def _points(share: float) -> str:
    return f"{100 * share:+.2f} points"
