"""The rank profile: for each layer and projection, which share of its components is kept."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from soco_export.report.draw.style import INK
from soco_export.report.material import Material
from soco_export.report.schema import Results

if TYPE_CHECKING:
    from soco_train.plan.rank_plan import LayerPlan

_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
WRITTEN = 14  # layers up to which each cell holds its percentage
_Cell = tuple[str, int]  # projection, layer


def cells(layers: Mapping[str, LayerPlan]) -> dict[_Cell, tuple[float, bool]]:
    """Return per projection and layer the mean share that is kept, and whether all of it is dense.

    Linears of one name but for further numbers (experts) share a cell.
    """
    found: dict[_Cell, list[LayerPlan]] = {}
    for name, layer in layers.items():
        number = _NUMBER.search(name)
        projection = _NUMBER.sub(".*", name[number.end() :]).strip(".") if number else name
        found.setdefault((projection, int(number[1]) if number else 0), []).append(layer)
    return {
        cell: (
            sum(plan.share for plan in plans) / len(plans),
            all(plan.whole for plan in plans),
        )
        for cell, plans in found.items()
    }


def draw(results: Results, material: Material, figure: Any) -> str:
    """Draw the profile as a heat map; a dot marks what stays dense."""
    import numpy as np
    from matplotlib import colormaps
    from matplotlib.colors import BoundaryNorm

    found = cells(material.layers)
    if not found:
        return ""
    rows = list(dict.fromkeys(projection for projection, _ in found))
    columns = sorted({layer for _, layer in found})
    shares = np.full((len(rows), len(columns)), np.nan)
    for (projection, layer), (share, _) in found.items():
        shares[rows.index(projection), columns.index(layer)] = share
    figure.set_size_inches(6.4, 1.2 + 0.3 * len(rows))
    axes = figure.subplots()
    steps = np.linspace(0, 1, 11)
    colours = colormaps["viridis"].resampled(10)
    mesh = axes.pcolormesh(np.ma.masked_invalid(shares), cmap=colours, norm=BoundaryNorm(steps, 10), linewidth=0)
    _mark(axes, found, (rows, columns))
    axes.set_yticks(np.arange(len(rows)) + 0.5, [row.split(".")[-1] if _unique(rows) else row for row in rows])
    shown = columns[:: max(1, len(columns) // 12)]
    axes.set_xticks([columns.index(layer) + 0.5 for layer in shown], [str(layer) for layer in shown])
    axes.set_xlabel("layer")
    axes.invert_yaxis()
    axes.tick_params(length=0)
    bar = figure.colorbar(mesh, ax=axes, ticks=[0, 0.5, 1], format=lambda share, _: f"{share:.0%}", pad=0.01)
    bar.set_label("components kept", color=INK)
    kept = [share for share, _ in found.values()]
    dense = sum(is_dense for _, is_dense in found.values())
    return (
        f"Share of each layer's components that is kept, from {min(kept):.0%} to {max(kept):.0%}; "
        f"a dot marks the {dense} of {len(found)} that stay dense."
    )


def _unique(rows: list[str]) -> bool:
    return len({row.split(".")[-1] for row in rows}) == len(rows)


def _mark(axes: Any, found: Mapping[_Cell, tuple[float, bool]], places: tuple[list[str], list[int]]) -> None:
    rows, columns = places
    for (projection, layer), (share, dense) in found.items():
        at = (columns.index(layer) + 0.5, rows.index(projection) + 0.5)
        colour = "black" if share > 0.6 else "white"
        if dense:
            axes.text(*at, "●", ha="center", va="center", color=colour, fontsize=8)
        elif len(columns) <= WRITTEN:
            axes.text(*at, f"{share:.0%}", ha="center", va="center", color=colour, fontsize=8)
