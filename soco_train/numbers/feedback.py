"""Rounding that knows the inputs: error feedback, then coordinate descent, in the metric tr(E C Eᵀ).

    C = E[x xᵀ] [n, n]      E = W - Ŵ      tr(E C Eᵀ) = E‖Wx - Ŵx‖²

Rows do not meet in this metric, so they are rounded side by side. With C = R Rᵀ, R upper triangular, the error of the
columns before j is best answered by moving column j by Σ_k e_k R_kj / R_jj before it is rounded (GPTQ, arXiv
2210.17323; LDLQ, arXiv 2307.13304). Inputs of most energy go first, the grids are fixed before (static groups). Then
each column is looked at again with all others as they are (QuantEase, arXiv 2309.01885), and the scales are fitted
again by least squares. No row ends worse than nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from soco_train.numbers.blocks import Grid, Levels, nearest, to_half, to_levels, with_range

DAMPING = 0.01  # of the mean of the diagonal, as GPTQ has it
_SWEEPS = 2  # of coordinate descent: the third takes less than 1 % of what nearest loses
_STRIP = 64  # columns whose feedback is added up before it goes to all others
_SHRINK = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.82, 0.78, 0.74, 0.7, 0.65)  # of the range, for the search of scales


@dataclass(frozen=True)
class Curvature:
    """A covariance C made ready for rounding.

    covariance: C; damped: H = C with a raised diagonal, both [n, n]; order: columns by falling energy [n]; feedback:
    R_kj / R_jj above the diagonal, in that order; spread: tr(C) / tr(D) of H = LDLᵀ, by which feedback cuts the error.
    """

    covariance: torch.Tensor
    damped: torch.Tensor
    order: torch.Tensor
    feedback: torch.Tensor
    spread: float


def curvature(covariance: torch.Tensor, dtype: torch.dtype = torch.float32) -> Curvature:
    """Factorise C [n, n] in float64; what rounding uses of it is in `dtype`."""
    exact = covariance.double()
    damped = exact.clone()
    damped.diagonal().add_(DAMPING * (float(exact.diagonal().mean()) or 1.0))
    order = damped.diagonal().argsort(descending=True, stable=True)
    # Upper triangular R with H = R Rᵀ: the lower Cholesky factor of H with rows and columns reversed.
    factor = torch.linalg.cholesky(damped[order][:, order].flip(0, 1)).flip(0, 1)
    spread = float(damped.diagonal().sum() / factor.diagonal().square().sum())
    feedback = (factor / factor.diagonal()).triu_(1)
    return Curvature(exact.to(dtype), damped.to(dtype), order, feedback.to(dtype), spread)


def row_errors(weight: torch.Tensor, rounded: torch.Tensor, covariance: torch.Tensor) -> torch.Tensor:
    """Return the mean squared error of each output, the diagonal of E C Eᵀ [m]."""
    off = weight - rounded
    return ((off @ covariance) * off).sum(1)


def calibrated(weight: torch.Tensor, grid: Grid, known: Curvature) -> Levels:
    """Round a matrix [m, n] of the dtype of `known`; each row by feedback or to nearest, whichever is better."""
    plain, energy = nearest(weight, grid), known.damped.diagonal()
    found = _with_feedback(weight, *_best_scales(weight, grid, energy), grid, known)
    for _ in range(_SWEEPS):
        found = _descended(weight, _rescaled(weight, found, grid, known.damped), grid, known.damped)
    errors = (row_errors(weight, option.values(), known.covariance) for option in (plain, found))
    return _rows_of(plain, found, torch.le(*errors))


def _rows_of(one: Levels, other: Levels, first: torch.Tensor) -> Levels:
    """Return the rows of `one` where `first` [m], else those of `other`."""
    rows = first[:, None]
    return Levels(
        torch.where(rows[..., None], one.levels, other.levels),
        torch.where(rows, one.scales, other.scales),
        torch.where(rows, one.zeros, other.zeros),
        one.width,
    )


def _best_scales(weight: torch.Tensor, grid: Grid, energy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (scales, zeros) of least squared error weighted by `energy` [n], among shrunken ranges."""
    blocks, weights = grid.blocks(weight), grid.blocks(energy[None])
    candidates = _candidates(blocks, grid)
    scales, zeros = next(candidates)
    least = _cost(blocks, scales, zeros, weights, grid)
    for other_scales, other_zeros in candidates:
        cost = _cost(blocks, other_scales, other_zeros, weights, grid)
        better = cost < least
        least = torch.where(better, cost, least)
        scales, zeros = torch.where(better, other_scales, scales), torch.where(better, other_zeros, zeros)
    return scales, zeros


def _cost(
    blocks: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, weights: torch.Tensor, grid: Grid
) -> torch.Tensor:
    levels = to_levels(blocks, scales, zeros, grid)
    off = levels.sub_(zeros[..., None]).mul_(scales[..., None]).sub_(blocks)
    return off.square_().mul_(weights).sum(-1)


def _candidates(blocks: torch.Tensor, grid: Grid) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield (scales, zeros) to choose from; those of nearest are the first.

    A symmetric grid has one level more below zero, or above it with a negative scale.
    """
    low, high = blocks.amin(-1).clamp(max=0), blocks.amax(-1).clamp(min=0)
    if not grid.symmetric:
        for share in _SHRINK:
            yield with_range(low * share, high * share, grid)
        return
    zeros, fewer = torch.full_like(low, grid.half), max(1, grid.half - 1)
    below, above = torch.maximum(-low / grid.half, high / fewer), torch.maximum(high / grid.half, -low / fewer)
    for share in _SHRINK:
        yield to_half(torch.where(-low > high, low, high) / -grid.half * share), zeros
        yield to_half(below * share), zeros
        yield to_half(-above * share), zeros


class _Columns:
    """Rounds a column [m] at a time to fixed grids; what belongs to a block of columns lies together."""

    def __init__(self, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid) -> None:
        self.grid, self.scales, self.zeros = grid, scales.T.contiguous(), zeros.T.contiguous()
        self.divisors = torch.where(self.scales == 0, 1, self.scales)

    def nearest(self, j: int, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (levels, values) nearest to `target` in the column j: as to_levels has it."""
        block = j // self.grid.block
        zero = self.zeros[block]
        level = (target / self.divisors[block]).round_().add_(zero).clamp_(0, self.grid.top)
        return level, (level - zero).mul_(self.scales[block])


def _with_feedback(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, grid: Grid, known: Curvature
) -> Levels:
    """Round column after column in the order of `known`, each moved by what the errors before it ask for."""
    m, n = weight.shape
    columns, rounding = known.order.tolist(), _Columns(scales, zeros, grid)
    exact = weight.T[known.order].contiguous()  # [n, m]: what is worked on at one time lies together
    wanted, levels = exact.clone(), exact.new_zeros(scales.shape[1] * grid.block, m)
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        errors = exact.new_zeros(stop - start, m)
        for j in range(start, stop):
            target = wanted[j] + known.feedback[start:j, j] @ errors[: j - start]
            levels[columns[j]], value = rounding.nearest(columns[j], target)
            torch.sub(exact[j], value, out=errors[j - start])
        wanted[stop:] += known.feedback[start:stop, stop:].T @ errors
    return Levels(levels.T.reshape(m, -1, grid.block), scales, zeros, n)


def _descended(weight: torch.Tensor, found: Levels, grid: Grid, H: torch.Tensor) -> Levels:
    """Return every column rounded again with all others as they are: tr(E H Eᵀ) never rises."""
    m, n = weight.shape
    values = found.values().T.contiguous()
    slope, levels = H @ (weight.T - values), found.levels.flatten(1).T.contiguous()
    rounding, diagonal = _Columns(found.scales, found.zeros, grid), H.diagonal().tolist()
    for start in range(0, n, _STRIP):
        stop = min(start + _STRIP, n)
        moves = values.new_zeros(stop - start, m)
        for j in range(start, stop):
            best = (slope[j] - H[j, start:stop] @ moves).div_(diagonal[j]).add_(values[j])
            levels[j], value = rounding.nearest(j, best)
            torch.sub(value, values[j], out=moves[j - start])
        slope -= H[:, start:stop] @ moves
        values[start:stop] += moves
    return Levels(levels.T.reshape(m, -1, grid.block), found.scales, found.zeros, n)


def _rescaled(weight: torch.Tensor, found: Levels, grid: Grid, H: torch.Tensor) -> Levels:
    """Return the same levels with the scales of least tr(E H Eᵀ): per row a system of as many unknowns as blocks."""
    n = weight.shape[1]
    units = (found.levels - found.zeros[..., None]).flatten(1)[:, :n]
    system = torch.stack(
        [
            grid.blocks((units[:, start : start + grid.block] @ H[start : start + grid.block]) * units).sum(-1)
            for start in range(0, n, grid.block)
        ],
        dim=1,
    )
    diagonal = system.diagonal(dim1=1, dim2=2)
    diagonal.mul_(1 + 1e-6).add_(torch.where(diagonal > 0, 0, 1))  # a block of zeros keeps the scale 0
    wanted = grid.blocks((weight @ H) * units).sum(-1)
    return Levels(found.levels, to_half(torch.linalg.solve(system, wanted)), found.zeros, n)
