"""Where the loss grew: by how rare the token is, how sure the dense model was, and the place in the window."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from soco_export.evaluate.figures import Tokens
from soco_export.report.draw.style import INK, MAIN
from soco_export.report.material import Material
from soco_export.report.schema import Results

PANELS = (
    ("frequency", "times in the text", "log"),
    ("entropy", "dense entropy (nats)", "linear"),
    ("position", "place in the window", "linear"),
)


def draw(results: Results, material: Material, figure: Any) -> str:
    """Draw the loss that was added in each tenth of the tokens, with its interval, in three orders."""
    found = results.forgetting
    if found is None:
        return ""
    panels = figure.subplots(1, len(PANELS), sharey=True)
    for axes, (name, label, scale) in zip(panels, PANELS, strict=True):
        _panel(axes, getattr(found, name))
        axes.set_xscale(scale)
        axes.set_xlabel(label)
    panels[0].set_ylabel("added loss (nats)")
    rare, common = found.frequency[0].added, found.frequency[-1].added
    first, last = found.position[0].added, found.position[-1].added
    return (
        f"Loss beside the dense model by tenths of the tokens: {rare:.3g} nats on the rarest and {common:.3g} on the "
        f"commonest, {first:.3g} where a window begins and {last:.3g} where it ends. Band: 95 % over windows."
    )


def _panel(axes: Any, kinds: Sequence[Tokens]) -> None:
    places = [(kind.low * kind.high) ** 0.5 if kind.low > 0 else kind.high / 2 for kind in kinds]
    axes.axhline(0.0, color=INK, linewidth=0.8)
    axes.plot(places, [kind.added for kind in kinds], "o-", color=MAIN, markersize=4)
    if all(kind.interval for kind in kinds):
        low, high = zip(*(kind.interval for kind in kinds if kind.interval), strict=True)
        axes.fill_between(places, low, high, color=MAIN, alpha=0.25, linewidth=0)
