"""Pivoted storage: a rank-r matrix as r of its own rows, and the other rows as combinations of those.

    W [m, n] = up down      rows → pivot = W[rows] [r, n]        z = pivot x
                            rest → mix   = W[rest] in the span   y[order] = [z ; mix z]

r(m+n-r) numbers instead of r(m+n): never more than dense, and lossless up to rounding. Source: PIFA (arXiv 2501.19090).
The error of fp16 or quantised storage grows with the coefficients in mix, so the pivot rows are chosen for small ones:
pivoted LU finds r independent rows, then swaps enlarge their volume until no coefficient exceeds `LARGEST`.
"""

from __future__ import annotations

import torch

from soco_train.artifacts import PivotedFactors, StackedFactors

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


def unpivot(factors: PivotedFactors) -> torch.Tensor:
    """Return the dense weight [m, n] that the factors stand for, in their dtype, computed in float64."""
    pivot = factors.pivot.double()
    weight = torch.empty(len(factors.order), pivot.shape[1], dtype=torch.float64, device=pivot.device)
    weight[factors.order] = torch.cat([pivot, factors.mix.double() @ pivot])
    return weight.to(factors.pivot.dtype)


def largest_coefficient(factors: PivotedFactors) -> float:
    """Return max |mix| (0 if every row is a pivot): by how much rounding of the pivots can grow."""
    return float(factors.mix.abs().max()) if factors.mix.numel() else 0.0


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
