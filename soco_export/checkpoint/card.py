"""The model card: what the model is, how to load it, what was measured, and the exact recipe that made it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from soco_export.checkpoint.record import INSTALL, QUANT_METHOD
from soco_export.files.text import fence, markdown, one_line

if TYPE_CHECKING:
    from torch import nn

_TEMPLATE = "card.md.jinja"

_Cell = float | int | str | None
_Results = Mapping[str, Mapping[str, _Cell]]


@dataclass(frozen=True)
class PrunedGroup:
    """The pruned layers of one role (q_proj, fc1, …): how many, of which kind, with ranks from `low` to `high`."""

    role: str
    count: int
    kind: str
    low: int
    high: int
    params_before: int
    params_after: int


@dataclass(frozen=True)
class CardSummary:
    """What the card says of the model: sizes in numbers (not bytes), pruned layers by role, where it comes from."""

    params_before: int
    params_after: int
    groups: tuple[PrunedGroup, ...]
    base_model: str = ""
    dense: bool = False
    provenance: Mapping[str, str] = field(default_factory=dict)


def summarise_layers(
    model: nn.Module,
    base_model: str = "",
    provenance: Mapping[str, str] | None = None,
    dense: bool = False,
    params_before: int | None = None,
) -> CardSummary:
    """Return the summary of a pruned `model`.

    base_model: hub id, or any other name; dense: the folder will hold the merged weights; params_before: size of the
    original model (None: worked out from the layers' shapes, which takes trained biases for original ones).
    """
    from soco_export.checkpoint.layers import factored_layers

    roles: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
    for name, module in factored_layers(model).items():
        before = module.in_features * module.out_features
        bias = module.dense_bias()
        after = sum(parameter.numel() for parameter in module.parameters()) - (0 if bias is None else bias.numel())
        roles.setdefault((name.rpartition(".")[2], module.kind), []).append((module.rank, before, after))
    groups = tuple(
        PrunedGroup(role, len(layers), kind, min(ranks), max(ranks), sum(before), sum(after))
        for (role, kind), layers in roles.items()
        for ranks, before, after in [tuple(zip(*layers, strict=True))]
    )
    after = sum(parameter.numel() for parameter in model.parameters())
    if params_before is None:
        params_before = after + sum(group.params_before - group.params_after for group in groups)
    return CardSummary(params_before, after, groups, base_model, dense, dict(provenance or {}))


def render_card(recipe_yaml: str, results: _Results | None, summary: CardSummary) -> str:
    """Return README.md.

    recipe_yaml: embedded as it is; results: row → column → figure, shown as one table (None: left out).
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    environment.filters["cell"] = format_cell
    environment.filters["code"] = lambda text: one_line(text).replace("`", "'")
    columns = list(dict.fromkeys(column for row in (results or {}).values() for column in row))
    text: str = environment.get_template(_TEMPLATE).render(
        summary=summary,
        hub_id=summary.base_model if _is_hub_id(summary.base_model) else "",
        recipe=recipe_yaml.strip("\n"),
        fence=fence(recipe_yaml),
        results=results or {},
        columns=columns,
        install=INSTALL,
        method=QUANT_METHOD,
    )
    return text.rstrip("\n") + "\n"


def format_cell(value: _Cell) -> str:
    """Return a figure as the card shows it: four significant digits, thousands set apart, `n/a` for None."""
    if value is None:
        return "n/a"
    if isinstance(value, str):
        return markdown(value)
    if isinstance(value, int) or abs(value) >= 10_000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def _is_hub_id(base_model: str) -> bool:
    """Only a hub id may stand in the card's header: a path says nothing to others, and may say too much."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", base_model) is not None
