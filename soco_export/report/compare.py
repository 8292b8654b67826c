"""Two results.json side by side: what differs, and how much of the first the second keeps.

`recovery` is above 1 where the second is better, whichever way the figure counts. Milliseconds of two runs are not
compared, only speed-ups: each of those is a ratio from one interleaved series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

from soco_export.evaluate.paired import perplexity_ratio
from soco_export.files.text import aligned, one_line
from soco_export.report.baseline import apart, changes, leaves
from soco_export.report.rendering import number
from soco_export.report.schema import Results
from soco_export.report.sentences import verdict_line

LESS_IS_BETTER = (
    "perplexity.*.value",
    "perplexity.ratio",
    "parity.*_kl",
    "sizes.params_after",
    "sizes.bytes*",
    "memory.ratio",
)
MORE_IS_BETTER = ("tasks.*.compressed.acc*", "tasks.*.recovery", "parity.*_agreement", "latency.*.speedup.value")


COUNTED = ("sizes.*",)
SAMPLED = ("tasks.*.compressed.acc",)
Z = 1.96
WIDEST = 24  # characters of a setting in a comparison
_NOISE = {True: "yes", False: "no", None: "n/a"}


@dataclass(frozen=True)
class Difference:
    """One figure in both results. `recovery`: the second relative to the first, 1 = as good, above 1 = better.

    `beyond_noise`: whether the two differ by more than both are uncertain, or, of what is counted and not sampled, at
    all; None where no uncertainty is known.
    """

    name: str
    one: float | None
    two: float | None
    recovery: float | None
    beyond_noise: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """`figures`: those with a better side; `settings`: recipe keys that differ, as (first's, second's) value.

    `changed`: what else differs, a line each: versions, machine, data;
    `texts`: what perplexity was measured on, where both have it.
    """

    verdicts: tuple[str, str]
    figures: tuple[Difference, ...]
    settings: Mapping[str, tuple[Any, Any]]
    changed: tuple[str, ...] = ()
    texts: tuple[str, str] | None = None

    def document(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        return asdict(self)


def compare_results(one: Results, two: Results) -> Comparison:
    """Compare two runs' results."""
    first, second = one.figures(), two.figures()
    names = [name for name in dict.fromkeys((*first, *second)) if _direction(name)]
    text = _of_text(one, two)
    figures = tuple(_difference(name, first, second, text.get(name)) for name in names)
    keys = (dict(leaves(one.recipe, "")), dict(leaves(two.recipe, "")))
    changed = [key for key in dict.fromkeys((*keys[0], *keys[1])) if keys[0].get(key) != keys[1].get(key)]
    return Comparison(
        verdicts=(verdict_line(one), verdict_line(two)),
        figures=tuple(d for d in figures if d.one is not None or d.two is not None),
        settings={key: (keys[0].get(key), keys[1].get(key)) for key in changed},
        texts=_named(one, two),
        changed=tuple(line for line in changes(two, one) if not line.startswith("recipe ")),
    )


def render_comparison(comparison: Comparison, names: tuple[str, str] = ("first", "second")) -> str:
    """Return the comparison as aligned text; `names`: what the two results are called."""
    differing = [d for d in comparison.figures if d.one != d.two]
    figures = [
        (_brief(d.name), number(d.one), number(d.two), number(d.recovery), _NOISE[d.beyond_noise]) for d in differing
    ]
    settings = [(key, _short(one), _short(two)) for key, (one, two) in comparison.settings.items()]
    parts = [f"{name}: {verdict}" for name, verdict in zip(names, comparison.verdicts, strict=True)]
    if figures:
        parts += ["", *aligned(("", *names, "recovery", "> noise"), figures)]
        parts += ["recovery: above 1, the second is better", "> noise: n/a where no uncertainty was measured"]
    parts += _texts(comparison.texts)
    parts.append(f"{len(comparison.figures) - len(differing)} of {len(comparison.figures)} figures are the same")
    if settings:
        parts += ["", "settings that differ", *aligned(("", *names), settings)]
    if comparison.changed:
        parts += ["", f"what else changed ({names[0]} → {names[1]})", *comparison.changed]
    return "\n".join(parts) + "\n"


def _brief(name: str) -> str:
    return name.removeprefix("latency.workloads.").removeprefix("parity.").removesuffix(".value")


def _short(value: Any) -> str:
    text = one_line(str(value))
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 1]}…"


def _named(one: Results, two: Results) -> tuple[str, str] | None:
    found = one.perplexity, two.perplexity
    names = [f"{p.text}, {p.block} tokens a window, {p.fingerprint[:12]}" for p in found if p is not None]
    return (names[0], names[1]) if len(names) == len(found) else None


def _texts(texts: tuple[str, str] | None) -> list[str]:
    if texts is None:
        return []
    if texts[0] == texts[1]:
        return [f"Perplexity of {texts[0]}"]
    return ["Perplexity is of two texts and no comparison:", *(f"  {text}" for text in texts)]


def _direction(name: str) -> int:
    if any(fnmatchcase(name, pattern) for pattern in LESS_IS_BETTER):
        return -1
    return int(any(fnmatchcase(name, pattern) for pattern in MORE_IS_BETTER))


def _of_text(one: Results, two: Results) -> dict[str, bool]:
    """Return which perplexities differ by more than chance in the choice of the text, of runs on the same blocks."""
    first, second = one.perplexity, two.perplexity
    if first is None or second is None or (first.fingerprint, first.block) != (second.fingerprint, second.block):
        return {}
    found = {}
    for form in ("dense", "low_rank", "onnx"):
        figures = getattr(first, form), getattr(second, form)
        ends = perplexity_ratio(*figures)[1] if all(figures) else None
        if ends:
            found[f"perplexity.{form}.value"] = not ends[0] <= 1 <= ends[1]
    # Beside the same dense model the ratio differs as what ships does.
    shipped = "perplexity.onnx.value" if first.onnx and second.onnx else "perplexity.low_rank.value"
    same = first.dense.blocks == second.dense.blocks and bool(first.onnx) == bool(second.onnx)
    return {**found, **({"perplexity.ratio": found[shipped]} if same and shipped in found else {})}


def _difference(
    name: str, first: Mapping[str, float | None], second: Mapping[str, float | None], beyond: bool | None
) -> Difference:
    one, two = first.get(name), second.get(name)
    upper, lower = (two, one) if _direction(name) > 0 else (one, two)
    recovery = upper / lower if upper is not None and lower else None
    if beyond is None:
        beyond = _beyond_noise(name, one, two, (first, second))
    return Difference(name, one, two, recovery, beyond)


def _beyond_noise(
    name: str, one: float | None, two: float | None, sides: tuple[Mapping[str, float | None], ...]
) -> bool | None:
    if one is None or two is None:
        return None
    if any(fnmatchcase(name, pattern) for pattern in COUNTED):
        return one != two
    if any(fnmatchcase(name, pattern) for pattern in SAMPLED):
        errors = [side.get(f"{name.rpartition('.')[0]}.stderr") for side in sides]
        known = [error for error in errors if error is not None]
        return None if len(known) < len(errors) else abs(one - two) > Z * math.hypot(*known)
    ends = apart(name, *sides)  # of what the second is to the first
    return None if ends is None else not ends[0] <= one <= ends[1]
