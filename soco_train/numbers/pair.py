"""Rounding of a factor pair y = up (down x), both factors for what the other became.

The metric is ‖(up · down - ûp · d̂own) C^½‖², C = E[x xᵀ]. Any invertible T may stand between the factors: up T⁻¹,
T down. Here it first makes them as large as each other in every component, in the basis in which the components do not
meet; then an orthogonal T mixes the components, so that no block of `up` has large and small columns and no row of
`down` is worth much more than another. It is multiplied in, so nothing of it runs. Then in turns

    down  is rounded with C
    up    is fitted again to the rounded down by least squares, and rounded with its inputs' covariance d̂own C d̂ownᵀ
    down  is fitted again to the rounded up

and the best pair by the metric is kept (CALDERA, arXiv 2405.18886, alternates so without feedback).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from soco_train.numbers.blocks import Grid, Levels, nearest
from soco_train.numbers.feedback import Curvature, calibrated, curvature

_ROUNDS = 3
_LEAST = 1e-9  # of the largest: a component without energy has any size


def product(chain: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return in float64 what the matrices that an input goes through, [down, up] or [weight], do to it together."""
    first, *rest = (matrix.double() for matrix in chain)
    return rest[0] @ first if rest else first


def chain_error(chain: Sequence[torch.Tensor], covariance: torch.Tensor, target: torch.Tensor) -> float:
    """Return E‖(target - product of the chain) x‖² in float64; target: [m, n]."""
    off = target - product(chain)
    return float(((off @ covariance.double()) * off).sum())


def calibrated_pair(
    down: torch.Tensor, up: torch.Tensor, grid: Grid, known: Curvature, covariance: torch.Tensor
) -> tuple[Levels, Levels]:
    """Round down [r, n] and up [m, r] of the dtype of `known`; `covariance`: C in float64. Never worse than nearest."""
    target = product([down, up])
    best = nearest(down, grid), nearest(up, grid)
    least = chain_error([part.values() for part in best], covariance, target)
    wanted = mixed(*balanced(down, up, known.damped))[0]
    for _ in range(_ROUNDS):
        first = calibrated(wanted.to(down.dtype), grid, known)
        below = first.values().double()
        seen = below @ covariance @ below.T
        fitted = _solved(seen, below @ covariance @ target.T).T
        second = calibrated(fitted.to(up.dtype), grid, curvature(seen, up.dtype))
        above = second.values().double()
        error = chain_error([below, above], covariance, target)
        if error < least:
            least, best = error, (first, second)
        wanted = _solved(above.T @ above, above.T @ target)
    return best


def balanced(down: torch.Tensor, up: torch.Tensor, damped: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair of the same product, in float64, with up = U √σ and down C^½ = √σ Vᵀ (U, V orthonormal)."""
    basis, inner = torch.linalg.qr(up.double())
    rows = inner @ down.double()
    root = torch.linalg.cholesky(damped.double())
    left, sigma, _ = torch.linalg.svd(rows @ root, full_matrices=False)
    size = sigma.clamp_min(_LEAST * float(sigma[0]) or 1.0).sqrt()
    return (left.T @ rows) / size[:, None], basis @ left * size


def mixed(down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the pair with its components mixed by the orthonormal discrete cosine transform."""
    rank = len(down)
    number = torch.arange(rank, dtype=torch.float64, device=down.device)
    mixing = torch.cos(math.pi / rank * (number + 0.5) * number[:, None]) * math.sqrt(2 / rank)
    mixing[0] /= math.sqrt(2)
    return mixing @ down, up @ mixing.T


def kappa(down: torch.Tensor, known: Curvature) -> float:
    """Return the mean over components of ‖b‖² tr(C) / (n · b C bᵀ) ≥ 1: by how much they amplify white noise."""
    rows = down.to(known.damped.dtype)
    energy = ((rows @ known.damped) * rows).sum(1)
    mean = known.damped.diagonal().mean()
    return float((rows.square().sum(1) * mean / energy.clamp_min(1e-30)).mean())


def _solved(system: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Solve for a positive semi-definite system; what it does not determine stays small."""
    damped = system.clone()
    damped.diagonal().add_(1e-9 * (float(system.diagonal().mean()) or 1.0))
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(damped))
