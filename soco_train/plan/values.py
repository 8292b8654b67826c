"""Fewer numbers a value head in the same budget as ranks: of every attention whichever loses less.

Both are measured alike: squared errors of outputs, weighted by how much they matter. An attention is offered the ranks
of its two projections, or fewer numbers a value head and neither of them cut, at one price with all other layers. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import numpy as np
import numpy.typing as npt

from soco_train.bounded import MADE_ANEW, answering
from soco_train.plan.allocation import Integers, Ladder, Reals, best_rungs, kept_importance, lagrangian_ranks
from soco_train.settings.refine import HEAD_STEP

_TRIED = 8  # sizes of a value head, the whole one included
_COMPARED = 64  # ranks of each projection that are put beside fewer numbers; when that is settled, all are
_Menu = tuple[Integers, Reals]  # costs, rising, and what is kept at each


@dataclass(frozen=True)
class ValueLosses:
    """What one attention loses with fewer numbers a value head.

    value, output: its projections; size: numbers of a whole head; lost: numbers that stay, rising, and the error then.
    """

    value: str
    output: str
    size: int
    lost: tuple[tuple[int, float], ...]

    def record(self) -> list[Any]:
        """Return it as JSON has it."""
        return [self.value, self.output, self.size, [list(pair) for pair in self.lost]]


def numbers_tried(size: int) -> range:
    """Return the numbers that may stay of a value head of `size`: evenly spread, whole steps, fewer than all."""
    step = HEAD_STEP * -(-size // (_TRIED * HEAD_STEP))
    return range(step, size, step)


def read_value_losses(records: Any, shapes: Mapping[str, tuple[int, int]]) -> list[ValueLosses]:
    """Return what `ValueLosses.record` wrote of projections of these `shapes`; DataError if it is something else."""

    def make() -> list[ValueLosses]:
        found = [
            ValueLosses(value, output, size, tuple((stay, float(error)) for stay, error in lost))
            for value, output, size, lost in records
        ]
        names = [name for site in found for name in (site.value, site.output)]
        if len({*names} & {*shapes}) < len(names) or not all(_possible(site, shapes) for site in found):
            raise ValueError("they are not those of the layers")
        return found

    losses: list[ValueLosses] = answering("these are no losses of value heads", "values", MADE_ANEW, make)
    return losses


def _possible(site: ValueLosses, shapes: Mapping[str, tuple[int, int]]) -> bool:
    """Tell whether both layers are made of such heads, and fewer of their numbers have errors that are some."""
    stay = [0, *(stay for stay, _ in site.lost), site.size]
    rising = all(type(number) is int for number in stay) and all(one < other for one, other in pairwise(stay))
    heads = rising and not shapes[site.value][0] % site.size and not shapes[site.output][1] % site.size
    return heads and len(stay) > 2 and all(isfinite(lost) and lost >= 0 for _, lost in site.lost)


def ranks_or_numbers(
    names: Iterable[str],
    ladders: Sequence[Ladder],
    importances: Sequence[Reals],
    sites: Sequence[ValueLosses],
    budget: int,
) -> tuple[list[int], dict[str, int]]:
    """Return (one rank per layer, numbers of a value head that stay by v_proj), of at most `budget` parameters.

    Both projections of an attention with fewer numbers have their full ranks. By the errors this is never worse than
    `lagrangian_ranks`, and the same where fewer numbers save none.
    """
    if not sites:
        return lagrangian_ranks(ladders, importances, budget), {}
    ends = dict(zip(names, ladders, strict=True))
    kept = map(kept_importance, ladders, importances)
    ranked = {name: (ladder.costs, values) for (name, ladder), values in zip(ends.items(), kept, strict=True)}
    tried = [(some, *_best(ranked, some, budget)) for some in ([], _narrowed(ranked, sites, budget))]
    narrowed, _, rungs = max(tried, key=lambda found: found[1])
    numbers = {site.value: site.lost[rungs[site.value]][0] for site in narrowed}
    full = {name for site in narrowed for name in (site.value, site.output)}
    ranks = [int(ladder.ranks[-1 if name in full else rungs[name]]) for name, ladder in ends.items()]
    return ranks, numbers


def _best(ranked: Mapping[str, _Menu], narrowed: Sequence[ValueLosses], budget: int) -> tuple[float, dict[str, int]]:
    """Return (what is kept, the rung of each menu) with fewer numbers in these attentions and ranks in all others."""
    outputs = {site.output for site in narrowed}
    menus = {name: menu for name, menu in ranked.items() if name not in outputs}
    menus |= {site.value: _fewer(site, ranked) for site in narrowed}
    rungs = _spend(menus, budget)
    return sum(float(menus[name][1][rung]) for name, rung in rungs.items()), rungs


def _narrowed(ranked: Mapping[str, _Menu], sites: Sequence[ValueLosses], budget: int) -> list[ValueLosses]:
    """Return the attentions for which fewer numbers keep more than ranks, where a parameter has one price."""
    apart = {name for site in sites for name in (site.value, site.output)}
    either = {site.value: _either(site, ranked) for site in sites}
    menus = {name: menu for name, menu in ranked.items() if name not in apart}
    rungs = _spend(menus | {name: menu for name, (menu, _) in either.items()}, budget)
    return [site for site in sites if either[site.value][1][rungs[site.value]]]


def _spend(menus: Mapping[str, _Menu], budget: int) -> dict[str, int]:
    costs, kept = zip(*menus.values(), strict=True)
    return dict(zip(menus, best_rungs(costs, kept, budget), strict=True))


def _fewer(site: ValueLosses, ranked: Mapping[str, _Menu]) -> _Menu:
    """Return what an attention costs and keeps with fewer numbers a value head."""
    (value_costs, value_kept), (output_costs, output_kept) = ranked[site.value], ranked[site.output]
    stay, lost = np.array([stay for stay, _ in site.lost], np.int64), np.array([lost for _, lost in site.lost])
    return (value_costs[-1] + output_costs[-1]) * stay // site.size, value_kept[-1] + output_kept[-1] - lost


def _either(site: ValueLosses, ranked: Mapping[str, _Menu]) -> tuple[_Menu, npt.NDArray[np.bool_]]:
    """Return the menu of an attention's pairs of ranks and its fewer numbers, and which of it are the latter."""
    value, output, fewer = _some(ranked[site.value]), _some(ranked[site.output]), _fewer(site, ranked)
    costs, kept = (
        np.concatenate([np.add.outer(*pair).ravel(), more])
        for pair, more in zip(zip(value, output, strict=True), fewer, strict=True)
    )
    order = np.lexsort((-kept, costs))
    most = np.maximum.accumulate(kept[order])
    order = order[np.append(True, kept[order][1:] > most[:-1])]
    return (costs[order], kept[order]), order >= len(costs) - len(fewer[0])


def _some(menu: _Menu) -> _Menu:
    """Return a menu, or some of a long one that are spread evenly."""
    costs, kept = menu
    rungs = np.unique(np.linspace(0, len(costs) - 1, min(_COMPARED, len(costs))).astype(np.int64))
    return costs[rungs], kept[rungs]
