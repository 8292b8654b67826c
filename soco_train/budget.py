"""What a rank costs, and how a budget of parameters becomes one rank per layer. Pure: no modules, no files.

Every layer has a ladder of sizes it can take: the allowed ranks that are cheaper than the dense layer, and the dense
layer itself. An allocation picks one rung per layer so that the costs sum to at most keep_params · Σ m·n:

    global      one list of all components by importance, cut where the budget ends (SoCo as published, made exact)
    lagrangian  the largest sum of kept importance, for additive saliencies; sees that pivoted ranks get cheaper
    uniform     the same fraction in every layer (SVD-LLM's rule; the control)
"""

from __future__ import annotations

import heapq
import json
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from soco_train.artifacts import LayerScores, Scores
from soco_train.errors import DataError, RecipeError
from soco_train.settings import Allocation, PlanSettings, Storage

Integers = npt.NDArray[np.int64]
Reals = npt.NDArray[np.float64]
Rank = TypeVar("Rank", int, Integers)


def layer_cost(rank: Rank, m: int, n: int, storage: Storage) -> Rank:
    """Return the parameters of an [m, n] layer stored at `rank`: stacked r(m+n), pivoted r(m+n-r).

    Accepts one rank or an array of ranks. The dense layer costs m·n; the pivoted cost reaches that at r = min(m, n),
    the stacked cost exceeds it from r = mn/(m+n) on. Source of the pivoted form: PIFA (arXiv 2501.19090).
    """
    return rank * (m + n - rank) if storage == "pivoted" else rank * (m + n)


@dataclass(frozen=True)
class Limit:
    """From `rank` on a layer stays dense although it would be smaller, because of `reason`."""

    rank: int
    reason: str


@dataclass(frozen=True)
class LayerPlan:
    """The size of one layer: rank (min(m, n) when dense), its parameters, and why it stays dense (else empty)."""

    shape: tuple[int, int]
    rank: int
    dense: bool
    params: int
    reason: str


@dataclass(frozen=True)
class RankPlan:
    """One rank per participating layer, in model order, and the settings it answers."""

    layers: Mapping[str, LayerPlan]
    keep_params: float
    storage: Storage
    allocation: Allocation

    @property
    def params_before(self) -> int:
        """Parameters of the participating layers when dense."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def params_after(self) -> int:
        """Parameters of the participating layers as planned, deviations included."""
        return sum(layer.params for layer in self.layers.values())

    @property
    def ratio(self) -> float:
        """params_after / params_before: at most keep_params."""
        return self.params_after / self.params_before

    @property
    def dense_layers(self) -> dict[str, str]:
        """Layers left dense, with the reason."""
        return {name: layer.reason for name, layer in self.layers.items() if layer.dense}

    def describe(self, total: int) -> str:
        """Return the plan in one line; `total` is the parameter count of the whole dense model."""
        before, after = self.params_before, self.params_after
        return (
            f"{_millions(total)} → {_millions(total - before + after)} "
            f"(selected {_millions(before)} → {_millions(after)}) · "
            f"{len(self.dense_layers)} of {len(self.layers)} layers left dense · stored {self.storage}"
        )

    def to_json(self) -> str:
        """Return the plan as the text of plan.json."""
        totals = {"params_before": self.params_before, "params_after": self.params_after}
        return json.dumps(asdict(self) | totals, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> RankPlan:
        """Read what `to_json` wrote; DataError if it is something else."""
        try:
            found = json.loads(text)
            layers = {
                name: LayerPlan(**(entry | {"shape": (entry["shape"][0], entry["shape"][1])}))
                for name, entry in found["layers"].items()
            }
            return RankPlan(layers, found["keep_params"], found["storage"], found["allocation"])
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"this is no rank plan: {error}", fix="write it again with the verb plan") from error


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"


@dataclass(frozen=True)
class _Ladder:
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
        return int(self.ranks[-1])

    def cost_at(self, survivors: int) -> int:
        return int(self.costs[self.rung_of[survivors]])


def _ladder(shape: tuple[int, int], settings: PlanSettings, extra: int, limit: Limit | None) -> _Ladder:
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
    return _Ladder(shape, ranks, costs, rung_of, limit)


def plan_ranks(
    scores: Scores,
    settings: PlanSettings,
    extra_cost: Mapping[str, int] | None = None,
    limits: Mapping[str, Limit] | None = None,
) -> RankPlan:
    """Choose every layer's rank so that the parameters sum to at most keep_params · Σ m·n.

    `extra_cost` is what a layer pays on top once it is pruned; by default m for a layer with a deviation (pass 0 where
    the deviation merges into an existing bias). `limits` keep layers dense from a rank on, whatever they would save.
    Ties go by (importance descending, layer order, index). Raises DataError for importances that are not finite or not
    one per component, RecipeError if rank 1 everywhere (or `multiple`) is already too much.
    """
    extra = _deviation_cost(scores) if extra_cost is None else extra_cost
    importances = [_checked(name, layer) for name, layer in scores.layers.items()]
    ends = limits or {}
    ladders = [
        _ladder(layer.shape, settings, extra.get(name, 0), ends.get(name)) for name, layer in scores.layers.items()
    ]
    keep = Fraction(str(settings.keep_params))  # the decimal the user wrote, so that no parameter is lost to rounding
    if settings.allocation == "uniform":
        survivors = _uniform(ladders, keep)
    else:
        budget = int(keep * sum(m * n for m, n in (ladder.shape for ladder in ladders)))
        _refuse_impossible(ladders, budget)
        allocate = _global if settings.allocation == "global" else _lagrangian
        survivors = allocate(ladders, importances, budget)
    layers = dict(zip(scores.layers, map(_layer_plan, ladders, survivors), strict=True))
    return RankPlan(layers, settings.keep_params, settings.storage, settings.allocation)


def kept(importance: torch.Tensor, rank: int) -> torch.Tensor:
    """Return the sorted indices [rank] of the surviving components; among equals the lower index survives."""
    order = torch.sort(importance, descending=True, stable=True).indices
    return order[:rank].sort().values


def _deviation_cost(scores: Scores) -> dict[str, int]:
    return {name: layer.shape[0] for name, layer in scores.layers.items() if layer.deviation is not None}


def _checked(name: str, layer: LayerScores) -> Reals:
    importance = layer.importance.detach().cpu().double()
    if importance.shape != (min(layer.shape),) or not bool(importance.isfinite().all()):
        raise DataError(
            f"importance {list(importance.shape)} of a {layer.shape} layer must be {min(layer.shape)} finite numbers",
            fix="train the scores again",
            where=name,
        )
    return np.asarray(importance.numpy(), dtype=np.float64)


def _layer_plan(ladder: _Ladder, survivors: int) -> LayerPlan:
    rung = int(ladder.rung_of[survivors])
    dense = rung == len(ladder.ranks) - 1
    reason = _reason(ladder) if dense else ""
    return LayerPlan(ladder.shape, int(ladder.ranks[rung]), dense, int(ladder.costs[rung]), reason)


def _reason(ladder: _Ladder) -> str:
    """Say why a layer that reached the last rung is dense: from the rank where dense is cheaper, the rest is free."""
    k, last = ladder.components, len(ladder.ranks) - 1
    first = int(np.argmax(ladder.rung_of == last))
    if ladder.limit is not None and first < k:
        return ladder.limit.reason
    if last == 0:
        return "no allowed rank is cheaper than dense"
    return f"all {k} components survive" if first == k else f"cheaper dense than rank {first} of {k}"


def _refuse_impossible(ladders: Sequence[_Ladder], budget: int) -> None:
    least = sum(int(ladder.costs[0]) for ladder in ladders)
    if least > budget:
        _raise_impossible(Fraction(least, sum(int(ladder.costs[-1]) for ladder in ladders)))


def _raise_impossible(least: Fraction) -> None:
    smallest = -(-least * 10_000 // 1) / 10_000  # rounded up, so that the advice works
    raise RecipeError(
        "keep_params leaves less than the smallest rank in every layer",
        fix=f"the smallest possible keep_params here is {smallest:.4f}",
        where="recipe: keep_params",
    )


def _uniform(ladders: Sequence[_Ladder], keep: Fraction) -> list[int]:
    """Give each layer the largest rung that costs at most `keep` of it."""
    least = max((Fraction(int(ladder.costs[0]), int(ladder.costs[-1])) for ladder in ladders), default=Fraction(0))
    if least > keep:
        _raise_impossible(least)
    rungs = [bisect_right(ladder.costs, int(keep * int(ladder.costs[-1]))) - 1 for ladder in ladders]
    return [int(ladder.ranks[rung]) for ladder, rung in zip(ladders, rungs, strict=True)]


def _global(ladders: Sequence[_Ladder], importances: Sequence[Reals], budget: int) -> list[int]:
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


def _lagrangian(ladders: Sequence[_Ladder], importances: Sequence[Reals], budget: int) -> list[int]:
    """Maximise the sum of kept importance: the best rungs at a price per parameter, then the best moves that fit."""
    values = [_value(*pair) for pair in zip(ladders, importances, strict=True)]
    rungs = _at_best_price(ladders, values, budget)
    left = budget - sum(int(ladder.costs[rung]) for ladder, rung in zip(ladders, rungs, strict=True))
    moves: list[tuple[float, int, int]] = []

    def offer(layer: int) -> None:
        costs, gains = ladders[layer].costs, values[layer]
        end = bisect_right(costs, left + int(costs[rungs[layer]]))
        start = rungs[layer]
        if start + 1 < end:
            density = (gains[start + 1 : end] - gains[start]) / (costs[start + 1 : end] - costs[start])
            best = int(density.argmax())
            heapq.heappush(moves, (-float(density[best]), layer, start + 1 + best))

    for layer in range(len(ladders)):
        offer(layer)
    while moves:
        _, layer, rung = heapq.heappop(moves)
        step = int(ladders[layer].costs[rung] - ladders[layer].costs[rungs[layer]])
        if step <= left:
            rungs[layer] = rung
            left -= step
        offer(layer)
    return [int(ladder.ranks[rung]) for ladder, rung in zip(ladders, rungs, strict=True)]


def _value(ladder: _Ladder, importance: Reals) -> Reals:
    """Return the importance kept at each rung."""
    return np.concatenate([[0.0], np.cumsum(np.sort(importance)[::-1])])[ladder.ranks]


def _at_best_price(ladders: Sequence[_Ladder], values: Sequence[Reals], budget: int) -> list[int]:
    """Return each layer's best rung at the lowest price λ per parameter whose demand fits the budget.

    The pivoted cost is concave in the rank, so all rungs are compared, not only neighbours.
    """
    width = max((len(value) for value in values), default=1)
    value = np.full((len(ladders), width), -np.inf)
    cost = np.zeros((len(ladders), width))
    for row, (ladder, gains) in enumerate(zip(ladders, values, strict=True)):
        value[row, : len(gains)], cost[row, : len(gains)] = gains, ladder.costs

    def demand(price: float) -> tuple[list[int], int]:
        best = np.argmax(value - price * cost, axis=1)
        return best.tolist(), int(np.take_along_axis(cost, best[:, None], axis=1).sum())

    low = 0.0
    high = max((float(np.abs(np.diff(gains)).max(initial=0.0)) for gains in values), default=0.0) + 1.0
    rungs = [0] * len(ladders)
    while low < (price := (low + high) / 2) < high:
        found, total = demand(price)
        if total <= budget:
            rungs, high = found, price
        else:
            low = price
    return rungs
