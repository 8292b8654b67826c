"""Pivoted storage: a rank-r matrix as r of its own rows, and the other rows as combinations of those.

    W [m, n] = up down      rows → pivot = W[rows] [r, n]        z = pivot x
                            rest → mix   = W[rest] in the span   y[order] = [z ; mix z]

r(m+n-r) numbers instead of r(m+n): never more than dense, and lossless up to rounding. Source: PIFA (arXiv 2501.19090).
The error of fp16 or quantised storage grows with the coefficients in mix, so the pivot rows are chosen for small ones:
pivoted LU finds r independent rows, then swaps enlarge their volume until no coefficient exceeds `LARGEST`.

    PivotedLinear   x ──weight [r,n]── z ─┬──────────────┐
                                          └─mix [m-r,r]──┴─ concat ── rows put in `order` ──(+ bias)── y
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from soco_train.forms.base import FactoredLinear, LayerFactors, form, parameter
from soco_train.forms.costs import pivoted_cost
from soco_train.forms.stacked import StackedFactors


@dataclass(frozen=True)
class PivotedFactors(LayerFactors):
    """z = pivot x; y[order] = [z ; mix z] (+ bias, already in y's order).

    pivot: [r, n], mix: [m - r, r], order: [m] int64, bias: [m] or None. order[i] is the output row that entry i of
    the concatenation goes to. Source: PIFA (arXiv 2501.19090).
    """

    notes: ClassVar = {
        weights: f"pivoted layers do not bear {weights}: every row but the pivots is a combination of rounded ones"
        for weights in ("int4", "int2")
    }
    cost = staticmethod(pivoted_cost)
    pivot: torch.Tensor
    mix: torch.Tensor
    order: torch.Tensor
    bias: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the dense layer."""
        return self.order.shape[0], self.pivot.shape[1]

    @classmethod
    def blank(cls, m: int, n: int, rank: int, bias: bool) -> PivotedFactors:
        """Return a layer of these sizes on the meta device."""
        with torch.device("meta"):
            order = torch.empty(m, dtype=torch.int64)
            return cls(torch.empty(rank, n), torch.empty(m - rank, rank), order, torch.empty(m) if bias else None)

    @classmethod
    def of(cls, up: torch.Tensor, down: torch.Tensor, bias: torch.Tensor | None) -> PivotedFactors:
        """Return the same map with r of its rows as pivots."""
        return pivot_factors(StackedFactors(up, down, bias))

    @staticmethod
    def cut_bytes(rank: float, m: int, n: int) -> float:
        """Return seven float64 arrays of [m, r], about what there is while pivots are chosen."""
        return 7 * 8 * m * rank

    def growth(self) -> float:
        """Return max |mix| (0 if every row is a pivot)."""
        return float(self.mix.abs().max()) if self.mix.numel() else 0.0


LARGEST = 1.05  # of |mix|; as good as column-pivoted QR on fp16 error; 1 would be the rows of locally largest volume


def pivot_factors(factors: StackedFactors) -> PivotedFactors:
    """Return the same map with r of its rows as pivots; up: [m, r], down: [r, n], r ≤ min(m, n).

    Computed in float64, returned in the dtype of the factors, with |mix| ≤ LARGEST before rounding. The bias stays in
    the order of y.
    """
    up = factors.up.detach().double()
    rows, rest, mix = _choose_rows(up)
    pivot = up[rows] @ factors.down.detach().double()
    dtype = factors.down.dtype
    return PivotedFactors(pivot.to(dtype), mix.to(dtype), torch.cat([rows, rest]), factors.bias)


def _choose_rows(up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (rows [r], rest [m - r], mix [m - r, r]) with up[rest] = mix @ up[rows] and |mix| ≤ LARGEST.

    With up[perm] = L U the coefficients L₂ L₁⁻¹ are free of U, hence of the conditioning of `up`: all that follows
    works on L, whose entries are at most 1.
    """
    r = up.shape[1]
    # Singular factors are welcome: U is not used. linalg.lu would make a matrix [m, m] of its permutation.
    packed, exchanges, _ = torch.linalg.lu_factor_ex(up)
    order = _order_of(exchanges, len(up))
    basis = torch.empty_like(packed)
    basis[order] = packed.tril_(-1)
    basis[order[:r], torch.arange(r)] = 1
    order = _swap_until_small(order, _coefficients(basis, order[:r], order[r:]))
    rows, rest = order[:r].sort().values, order[r:].sort().values
    return rows, rest, _coefficients(basis, rows, rest)


def _order_of(exchanges: torch.Tensor, m: int) -> torch.Tensor:
    """Return the order of m rows after each row i in turn has been exchanged with row exchanges[i] - 1."""
    order = list(range(m))
    for i, other in enumerate(exchanges.tolist()):
        order[i], order[other - 1] = order[other - 1], order[i]
    return torch.tensor(order)


def _coefficients(basis: torch.Tensor, rows: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.linalg.solve(basis[rows], basis[rest], left=False)


def _swap_until_small(order: torch.Tensor, mix: torch.Tensor) -> torch.Tensor:
    """Return the order after swapping rows with the pivots they depend on most, until no |mix| exceeds LARGEST.

    A swap multiplies the volume of the pivot rows by its coefficient, which is > LARGEST > 1, so this ends. `mix`
    [m - r, r] is updated in place, by a change of rank one.
    """
    r = mix.shape[1]
    while mix.numel():
        i, j = divmod(int(mix.abs().argmax()), r)
        largest = float(mix[i, j])
        if abs(largest) <= LARGEST:
            break
        column, row = mix[:, j].clone(), mix[i].clone()
        column[i] += 1
        row[j] -= 1
        mix.addr_(column, row, alpha=-1 / largest)
        order[[j, r + i]] = order[[r + i, j]]
    return order


@form(PivotedFactors)
class PivotedLinear(FactoredLinear):
    """y[order] = [z ; mix z] with z = weight x: r(m + n - r) numbers. Source: PIFA (arXiv 2501.19090).

    `weight` holds r rows of the dense weight, `mix` expresses the other m - r rows by them, and `order` (int64 [m],
    never cast) says which output row each entry of the concatenation is. As a buffer it needs `offload_buffers=True`
    where transformers 4.57 offloads such a layer to disk.
    """

    kind = "pivoted"
    height_part = order_part = "order"
    order: torch.Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, rank, device, dtype)
        self.mix = nn.Linear(rank, out_features - rank, bias=False, device=device, dtype=dtype)
        self.register_buffer("order", torch.arange(out_features, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_factors(
        cls, factors: PivotedFactors, dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> PivotedLinear:
        """Build from pivot [r, n], mix [m - r, r], order [m] and the complete bias [m] or None."""
        (rank, n), m = factors.pivot.shape, factors.order.shape[0]
        module = cls(n, m, rank, factors.bias is not None, device="meta")
        module.weight = parameter(factors.pivot, dtype, device)
        module.mix.weight = parameter(factors.mix, dtype, device)
        module.order = factors.order.detach().to(device=device, dtype=torch.int64, copy=True)
        if factors.bias is not None:
            module.bias = parameter(factors.bias, dtype, device)
        return module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        z = F.linear(x, self.weight)
        rows = torch.cat((z, self.mix(z)), dim=-1)
        y = torch.empty_like(rows).index_copy(-1, self.order, rows)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def dense_weight(self) -> torch.Tensor:
        """Return the rows [weight ; mix @ weight], each where `order` says."""
        exact = self._product_dtype()
        pivot = self.weight.detach().to(exact)
        rows = torch.cat((pivot, self.mix.weight.detach().to(exact) @ pivot))
        return torch.empty_like(rows).index_copy(0, self.order, rows)

    def dense_bias(self) -> torch.Tensor | None:
        """Return `bias`."""
        return self.bias
