"""What a rank costs, and the three ways to spend a budget on layers. Pure: shapes and importances in, survivors out.

Every layer has a ladder of sizes it can take: the allowed ranks that are cheaper than the dense layer, and the dense
layer itself. An allocation picks one rung per layer so that the costs sum to at most keep_params · Σ m·n:

    global      one list of all components by importance, cut where the budget ends (SoCo as published, made exact)
    lagrangian  the largest sum of kept importance, for additive saliencies; sees that pivoted ranks get cheaper
    uniform     the same fraction in every layer (SVD-LLM's rule; the control)
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from soco_train.errors import RecipeError
from soco_train.forms.costs import COSTS
from soco_train.settings.plan import PlanSettings, Storage, check_storage

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
Rank = TypeVar("Rank", int, Integers)


def layer_cost(rank: Rank, m: int, n: int, storage: Storage) -> Rank:
    """Return the parameters of an [m, n] layer stored at `rank`, one rank or an array of them; dense costs m·n."""
    cost: Rank = COSTS[check_storage(storage)](rank, m, n)
    return cost


@dataclass(frozen=True)
class Limit:
    """From `rank` on a layer stays dense although it would be smaller, because of `reason`."""

    rank: int
    reason: str


@dataclass(frozen=True)
class Ladder:
    """The sizes one layer can have, cheapest first; the last rung is the dense layer.

    rung_of[c] is the rung taken when c components survive, c = 0 … k (nobody goes below the first rung). `limit` is
    what ends the ladder, None where the parameters do.
    """

    shape: tuple[int, int]
    ranks: Integers
    costs: Integers
    rung_of: Integers
    limit: Limit | None

    @property
    def components(self) -> int:
        """The rank of the dense layer."""
        return int(self.ranks[-1])

    def cost_at(self, survivors: int) -> int:
        """Return the parameters when `survivors` components are left."""
        return int(self.costs[self.rung_of[survivors]])


def make_ladder(shape: tuple[int, int], settings: PlanSettings, extra: int, limit: Limit | None) -> Ladder:
    """Return the sizes of an [m, n] layer that pays `extra` parameters once it is pruned, up to its `limit`."""
    m, n = shape
    k, multiple = min(m, n), settings.multiple
    ranks = np.arange(multiple, k, multiple, dtype=np.int64)
    costs = layer_cost(ranks, m, n, settings.storage) + extra
    pays = costs < m * n
    if limit is not None:
        ends = bool((pays & (ranks >= limit.rank)).any())
        pays, limit = pays & (ranks < limit.rank), limit if ends else None
    ranks, costs = np.append(ranks[pays], k), np.append(costs[pays], m * n)
    rung_of = np.clip(np.arange(k + 1, dtype=np.int64) // multiple - 1, 0, len(ranks) - 1)
    rung_of[k] = len(ranks) - 1
    return Ladder(shape, ranks, costs, rung_of, limit)


def refuse_impossible(ladders: Sequence[Ladder], keep: Fraction) -> None:
    """Raise RecipeError if the first rungs together cost more than `keep` of all layers."""
    least, whole = (sum(int(ladder.costs[rung]) for ladder in ladders) for rung in (0, -1))
    if least > keep * whole:
        _raise_impossible(Fraction(least, whole), keep)


def _raise_impossible(least: Fraction, keep: Fraction) -> None:
    smallest = -(-least * 10_000 // 1) / 10_000  # rounded up, so that the advice works
    raise RecipeError(
        f"keep_params {float(keep):g} leaves less than the smallest rank in every layer",
        fix=f"the smallest possible keep_params here is {smallest:.4f}",
        where="recipe: keep_params",
    )


def uniform_ranks(ladders: Sequence[Ladder], keep: Fraction) -> list[int]:
    """Give each layer the largest rung that costs at most `keep` of it."""
    least = max((Fraction(int(ladder.costs[0]), int(ladder.costs[-1])) for ladder in ladders), default=Fraction(0))
    if least > keep:
        _raise_impossible(least, keep)
    rungs = [bisect_right(ladder.costs, int(keep * int(ladder.costs[-1]))) - 1 for ladder in ladders]
    return [int(ladder.ranks[rung]) for ladder, rung in zip(ladders, rungs, strict=True)]


def global_ranks(ladders: Sequence[Ladder], importances: Sequence[Reals], budget: int) -> list[int]:
    """Keep the longest prefix of all components, most important first, then whatever later ones still fit."""
    owners = np.repeat(np.arange(len(ladders)), [len(importance) for importance in importances])
    owners = owners[np.argsort(-np.concatenate(importances), kind="stable")]

    def survivors(prefix: int) -> list[int]:
        return [int(count) for count in np.bincount(owners[:prefix], minlength=len(ladders))]

    def cost(prefix: int) -> int:
        return sum(ladder.cost_at(count) for ladder, count in zip(ladders, survivors(prefix), strict=True))

    prefix = bisect_right(range(len(owners) + 1), budget, key=cost) - 1
    counts, left = survivors(prefix), budget - cost(prefix)
    open_layers = set(range(len(ladders)))
    for owner in owners[prefix:].tolist():
        if owner in open_layers:
            step = ladders[owner].cost_at(counts[owner] + 1) - ladders[owner].cost_at(counts[owner])
            if step <= left:
                counts[owner] += 1
                left -= step
            else:  # a layer never skips a component: its weaker ones must not outlive a stronger one
                open_layers.discard(owner)
        if not open_layers:
            break
    return counts


def lagrangian_ranks(ladders: Sequence[Ladder], importances: Sequence[Reals], budget: int) -> list[int]:
    """Maximise the sum of kept importance: the best rungs at a price per parameter, then the best moves that fit."""
    values = [kept_importance(*pair) for pair in zip(ladders, importances, strict=True)]
    rungs = best_rungs([ladder.costs for ladder in ladders], values, budget)
    return [int(ladder.ranks[rung]) for ladder, rung in zip(ladders, rungs, strict=True)]


def best_rungs(costs: Sequence[Integers], values: Sequence[Reals], budget: int) -> list[int]:
    """Return one rung per layer, with the largest sum of values found whose costs sum to at most `budget`.

    costs: rising, values: of each rung, by layer. Where even the first rungs cost more, these.
    """
    rungs = _at_best_price(costs, values, budget)
    left = budget - sum(int(cost[rung]) for cost, rung in zip(costs, rungs, strict=True))
    moves: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        cost, gains = costs[layer], values[layer]
        end = bisect_right(cost, left + int(cost[rungs[layer]]))
        start = rungs[layer]
        if start + 1 < end:
            density = (gains[start + 1 : end] - gains[start]) / (cost[start + 1 : end] - cost[start])
            best = int(density.argmax())
            heapq.heappush(moves, (-float(density[best]), layer, start + 1 + best))

    for layer in range(len(costs)):
        offer(layer)
    while moves:
        _, layer, rung = heapq.heappop(moves)
        step = int(costs[layer][rung] - costs[layer][rungs[layer]])
        if step <= left:
            rungs[layer] = rung
            left -= step
        offer(layer)
    return rungs


def kept_importance(ladder: Ladder, importance: Reals) -> Reals:
    """Return the importance kept at each rung."""
    return np.concatenate([[0.0], np.cumsum(np.sort(importance)[::-1])])[ladder.ranks]


def _at_best_price(costs: Sequence[Integers], values: Sequence[Reals], budget: int) -> list[int]:
    """Return each layer's best rung at the lowest price λ whose demand fits the budget.

    The pivoted cost is concave in the rank, so all rungs are compared, not only neighbours.
    """
    width = max((len(value) for value in values), default=1)
    value = np.full((len(costs), width), -np.inf)
    cost = np.zeros((len(costs), width))
    for row, (rising, gains) in enumerate(zip(costs, values, strict=True)):
        value[row, : len(gains)], cost[row, : len(gains)] = gains, rising

    def demand(price: float) -> tuple[list[int], int]:
        best = np.argmax(value - price * cost, axis=1)
        return best.tolist(), int(np.take_along_axis(cost, best[:, None], axis=1).sum())

    low = 0.0
    high = max((float(np.abs(np.diff(gains)).max(initial=0.0)) for gains in values), default=0.0) + 1.0
    rungs = [0] * len(costs)
    while low < (price := (low + high) / 2) < high:
        found, total = demand(price)
        if total <= budget:
            rungs, high = found, price
        else:
            low = price
    return rungs
