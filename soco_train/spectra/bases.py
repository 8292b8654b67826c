"""The bases a weight is decomposed in: which statistics they read, and the metric these give.

A basis is one decorated function: it returns the metric as a left and a right transform. To add one, write such a
function here and decorate it; decompose.py does the rest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from soco_train.errors import DataError, RecipeError
from soco_train.spectra.statistics import LayerStatistics

_REMEMBERED = 4  # q/k/v follow one another, so do gate/up: a few factors at a time save nearly all of the work


class Roots:
    """Lower Cholesky factors of covariances, shared between layers that hold the same tensor object.

    `ridge` is added to the diagonal as a share of its mean; where that does not make the matrix positive definite it
    grows tenfold until it does, and `ridge_of` says so. Only the latest few factors are kept.
    """

    def __init__(self, ridge: float) -> None:
        self.ridge = ridge
        self._latest: list[tuple[torch.Tensor, torch.Tensor, float]] = []

    def __call__(self, covariance: torch.Tensor) -> torch.Tensor:
        """Return L [n, n] float64 with L Lᵀ = covariance + ridge · mean(diagonal) · I."""
        return self._find(covariance)[1]

    def ridge_of(self, covariance: torch.Tensor) -> float:
        """Return the ridge this covariance took."""
        return self._find(covariance)[2]

    def _find(self, covariance: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
        for entry in self._latest:
            if entry[0] is covariance:
                return entry
        entry = (covariance, *_cholesky(covariance, self.ridge))
        self._latest = [entry, *self._latest][:_REMEMBERED]
        return entry


def _cholesky(covariance: torch.Tensor, ridge: float) -> tuple[torch.Tensor, float]:
    matrix = covariance.double()
    scale = float(matrix.diagonal().mean()) or 1.0  # zeros (a layer that no token excites) have no scale of their own
    while ridge <= 1:
        damped = matrix.clone()
        damped.diagonal().add_(ridge * scale)
        factor, info = torch.linalg.cholesky_ex(damped)
        if not int(info):
            return factor, ridge
        ridge = max(ridge, 1e-12) * 10
    raise DataError("a covariance is not positive semi-definite", fix="collect the calibration statistics again")


# One side of a metric: nothing, a diagonal [n], or a lower triangular matrix [n, n].
Transform = torch.Tensor | None


@dataclass(frozen=True)
class Metric:
    """ΔW is measured as ‖leftᵀ ΔW right‖."""

    left: Transform = None
    right: Transform = None


BasisFunction = Callable[[LayerStatistics, Roots], Metric]


@dataclass(frozen=True)
class Basis:
    """A registered basis: its metric, and the fields of LayerStatistics that it reads."""

    metric: BasisFunction
    needs: frozenset[str]


_BASES: dict[str, Basis] = {}


def basis(name: str, needs: tuple[str, ...] = ()) -> Callable[[BasisFunction], BasisFunction]:
    """Register the decorated function under `name` (recipe key train.basis); `needs` is what it reads."""

    def register(metric: BasisFunction) -> BasisFunction:
        _BASES[name] = Basis(metric, frozenset(needs))
        return metric

    return register


def find_basis(name: str) -> Basis:
    """Return a registered basis; RecipeError for an unknown name."""
    if name not in _BASES:
        raise RecipeError(
            f"no basis is called {name!r}", fix=f"one of {', '.join(_BASES)}", where="recipe: train.basis"
        )
    return _BASES[name]


@basis("plain")
def plain(statistics: LayerStatistics, roots: Roots) -> Metric:
    """The SVD of the weight itself."""
    return Metric()


@basis("fisher", needs=("row_fisher",))
def fisher(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Outputs (rows of W) weighted by the root of their Fisher information: FWSVD turned to the other axis [ours]."""
    return Metric(left=_diagonal(statistics.row_fisher, roots.ridge))


@basis("fisher-inputs", needs=("column_fisher",))
def fisher_inputs(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Inputs (columns of W) weighted by the root of their Fisher information (FWSVD, arXiv 2207.00112).

    The paper weights the rows of W [inputs, outputs], as its authors' models write y = x W; PyTorch's W is [m, n].
    """
    return Metric(right=_diagonal(statistics.column_fisher, roots.ridge))


@basis("sparsity", needs=("column_survivors",))
def sparsity(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Inputs weighted by the root of how many of their numbers first-order pruning would keep (LPAF, arXiv 2306.14152).

    Sparsity-aware SVD: the paper weights the rows of a pruned W by the numbers left in them. The weight that is
    decomposed is the whole one, pruning is foretold at one half and not trained, rows are inputs as in FWSVD [ours].
    """
    return Metric(right=_diagonal(statistics.column_survivors, roots.ridge))


@basis("activation", needs=("input_magnitude",))
def activation(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Columns scaled by E|x| to the power 1/2 (ASVD, arXiv 2312.05821)."""
    return Metric(right=_diagonal(statistics.input_magnitude, roots.ridge))


@basis("whitened", needs=("input_covariance",))
def whitened(statistics: LayerStatistics, roots: Roots) -> Metric:
    """The input whitened by its covariance, so that σ is the loss of output energy (SVD-LLM, arXiv 2403.07378)."""
    return Metric(right=roots(present(statistics.input_covariance)))


@basis("two-sided", needs=("input_covariance", "output_curvature"))
def two_sided(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Input whitened by its covariance and output by its curvature E[δ δᵀ]: a Kronecker-factored Fisher norm."""
    return Metric(roots(present(statistics.output_curvature)), roots(present(statistics.input_covariance)))


def present(statistic: torch.Tensor | None) -> torch.Tensor:
    """Return a statistic that a basis needs; ValueError if it was not collected."""
    if statistic is None:
        raise ValueError("the statistics lack what the basis needs; collect them with find_basis(name).needs")
    return statistic


def _diagonal(weights: torch.Tensor | None, ridge: float) -> torch.Tensor:
    """Return sqrt(weights + ridge · mean): a channel that never fires must not make the metric singular."""
    positive = present(weights).double()
    scale = float(positive.mean()) or 1.0
    return (positive + max(ridge, 1e-12) * scale).sqrt()
