"""A run against a committed results.json, purely: what became worse, by more than is allowed, and what else changed.

Quality and bytes are compared as figures of their own; speed only as the ratio to the dense model of the same run,
with both runs' intervals, since milliseconds of two occasions say nothing about the models.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from soco_export.report.gates import State, Verdict
from soco_export.report.schema import Results
from soco_train.errors import RecipeError

_LARGEST = math.log(sys.float_info.max)


@dataclass(frozen=True)
class Rule:
    """How much worse a figure (dotted name or glob) may be; `relative`: as a share of the baseline's value."""

    figures: str
    at_most: bool
    allowed: float
    relative: bool


RULES = (
    Rule("perplexity.ratio", True, 0.02, True),
    Rule("tasks.*.recovery", False, 0.02, False),
    Rule("parity.compression.*.mean_kl", True, 0.05, True),
    Rule("parity.export.*.token_agreement", False, 0.005, False),
    Rule("sizes.bytes.onnx", True, 0.01, True),
    Rule("sizes.bytes_ratio", True, 0.01, True),
    Rule("memory.ratio", True, 0.1, True),
    Rule("graph.nodes", True, 0.1, True),  # dense is as slow in a graph that is fused less: no ratio shows it
    Rule("latency.workloads.*.speedup.value", False, 0.05, True),
)
# What has to be the same for a comparison: name of the verdict → what it is called, section, field.
SAME = {
    "perplexity.text": (
        ("the evaluation text", "perplexity", "fingerprint"),
        ("the tokens per block", "perplexity", "block"),
    ),
    "latency.conditions": (("the number of threads", "latency", "threads"), ("the provider", "latency", "provider")),
}


def judge_against(
    run: Results, baseline: Results, tolerances: Mapping[str, float] | None = None
) -> tuple[Verdict, ...]:
    """Judge every figure of `baseline` that a rule is about. `tolerances`: figure or glob of RULES → what is allowed.

    A figure that the baseline has and this run lacks fails; so do perplexity of another text and speed on other
    threads, which are no comparison.
    Raises RecipeError for a tolerance that no rule is about.
    """
    rules = _with(tolerances or {})
    before, now = baseline.figures(), run.figures()
    verdicts = list(_incomparable(run, baseline))
    for name, value in before.items():
        rule = next((rule for rule in rules if fnmatchcase(name, rule.figures)), None)
        if rule is not None and value is not None:
            verdicts.append(_judge(rule, name, before, now))
    return tuple(verdicts)


def changes(run: Results, baseline: Results) -> list[str]:
    """Say what differs between the two runs that is no figure: versions, machine, data, model, recipe."""
    return [
        f"{name}: {_short(before)} → {_short(now)}"
        for (name, before), now in zip(_origins(baseline).items(), _origins(run).values(), strict=True)
        if before != now and not isinstance(before, Mapping)
    ] + [
        f"{name} {key}: {_short(before.get(key))} → {_short(now.get(key))}"
        for (name, before), now in zip(_origins(baseline).items(), _origins(run).values(), strict=True)
        if isinstance(before, Mapping)
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def parse_tolerances(texts: list[str] | None) -> dict[str, float]:
    """Return what `--tolerance FIGURE=NUMBER` says; raises RecipeError for something else."""
    found = {}
    for text in texts or ():
        name, _, number = text.partition("=")
        try:
            found[name] = float(number)
        except ValueError:
            found[name] = math.nan
        if not found[name] >= 0:
            raise RecipeError(
                f"{text} is no tolerance", fix="give FIGURE=NUMBER: perplexity.ratio=0.03", where="--tolerance"
            )
    return found


def _with(tolerances: Mapping[str, float]) -> list[Rule]:
    """Put the tolerances before the rules they are instances of, so that they are found first."""
    first = []
    for name, allowed in tolerances.items():
        known = next((rule for rule in RULES if name == rule.figures or fnmatchcase(name, rule.figures)), None)
        if known is None:
            names = ", ".join(rule.figures for rule in RULES)
            raise RecipeError(f"nothing is compared under the name {name}", fix=f"one of {names}", where="--tolerance")
        first.append(Rule(name, known.at_most, allowed, known.relative))
    return [*first, *RULES]


def _judge(rule: Rule, name: str, before: Mapping[str, float | None], now: Mapping[str, float | None]) -> Verdict:
    base, value = float(before[name] or 0.0), now.get(name)
    sign = 1 if rule.at_most else -1
    limit = base * (1 + sign * rule.allowed) if rule.relative else base + sign * rule.allowed
    if value is None:
        return Verdict(name, name, None, limit, False, f"not measured; the baseline has {base:.4g}")
    ends = apart(name, before, now)
    state = _state(sign, value, limit, ends)
    word = {"passed": "within", "failed": "beyond", "inconclusive": "too uncertain to say whether it is within"}[state]
    allowed = f"{100 * rule.allowed:g} %" if rule.relative else f"{rule.allowed:g}"
    spread = f" ({ends[0]:.4g} … {ends[1]:.4g})" if ends else ""
    message = f"{value:.5g}{spread}, the baseline {base:.5g}: {word} the {allowed} it may be worse"
    return Verdict(name, name, value, limit, state == "passed", message, ends, state == "inconclusive")


def _state(sign: int, value: float, limit: float, ends: tuple[float, float] | None) -> State:
    better, worse = sorted(sign * end for end in ends or (value, value))
    if math.isnan(value) or better > sign * limit:
        return "failed"
    return "passed" if worse <= sign * limit else "inconclusive"


def apart(name: str, before: Mapping[str, float | None], now: Mapping[str, float | None]) -> tuple[float, float] | None:
    """Return the interval of a ratio with the baseline's own uncertainty in it; None for a figure without one."""
    stem = name.removesuffix(".value")
    found = [side.get(f"{stem}.{end}") for side in (before, now) for end in ("low", "value", "high")]
    if stem == name or any(number is None or not number > 0 for number in found):
        return None
    low0, value0, high0, low, value, high = (math.log(number) for number in found if number is not None)
    down, up = math.hypot(value - low, high0 - value0), math.hypot(high - value, value0 - low0)
    return math.exp(value - down), math.exp(min(value + up, _LARGEST))


def _incomparable(run: Results, baseline: Results) -> Iterator[Verdict]:
    for verdict, title, section, field in ((name, *one) for name, each in SAME.items() for one in each):
        before, now = getattr(baseline, section), getattr(run, section)
        if before is None or now is None:
            continue
        one, two = getattr(before, field), getattr(now, field)
        if one != two:
            message = f"{title} is not the baseline's ({_short(one)} → {_short(two)}): no comparison"
            yield Verdict(verdict, f"{section}.{field}", None, 0.0, False, message)


def _origins(results: Results) -> dict[str, Any]:
    machine, provenance = results.machine, results.provenance
    return {
        "model": results.model.source,
        "model weights": provenance.get("model"),
        "calibration text": (provenance.get("calibration") or {}).get("fingerprint"),
        "evaluation text": results.perplexity.fingerprint if results.perplexity else None,
        "seed": provenance.get("seed"),
        "format": results.format,
        "processor": f"{machine.cpu}, {machine.cores} cores",
        "GPU": machine.gpu,
        "threads": machine.threads,
        "version of": dict(machine.versions),
        "recipe": dict(leaves(results.recipe, "")),
    }


def leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield what a nested mapping holds by dotted name; `name`: its own, "" for the outermost."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from leaves(inner, f"{name}.{key}" if name else str(key))
    else:
        yield name, value


def _short(value: Any) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}…"
