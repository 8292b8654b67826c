"""Weight → P, B, σ: the components whose importance is learnt, in a basis that knows what the layer sees.

A basis is one decorated function: it returns the metric in which the weight is decomposed, as a left and a right
transform. With M = Rᵀ W C = U Σ Vᵀ the components are P = R⁻ᵀ U Σ and B = Vᵀ C⁻¹, so that P B = W exactly, and cutting
the smallest σ is the best cut in the norm ‖Rᵀ ΔW C‖. To add a basis, write such a function here and decorate it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from soco_train.artifacts import Spectrum, SpectrumStore
from soco_train.errors import DataError, RecipeError
from soco_train.events import Event, Notify, silent
from soco_train.settings import TrainSettings
from soco_train.statistics import LayerStatistics, collect_statistics, groups

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
    """Rows weighted by the square root of their Fisher information (FWSVD, arXiv 2207.00112)."""
    return Metric(left=_diagonal(statistics.row_fisher, roots.ridge))


@basis("activation", needs=("input_magnitude",))
def activation(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Columns scaled by E|x| to the power 1/2 (ASVD, arXiv 2312.05821)."""
    return Metric(right=_diagonal(statistics.input_magnitude, roots.ridge))


@basis("whitened", needs=("input_covariance",))
def whitened(statistics: LayerStatistics, roots: Roots) -> Metric:
    """The input whitened by its covariance, so that σ is the loss of output energy (SVD-LLM, arXiv 2403.07378)."""
    return Metric(right=roots(_present(statistics.input_covariance)))


@basis("two-sided", needs=("input_covariance", "output_curvature"))
def two_sided(statistics: LayerStatistics, roots: Roots) -> Metric:
    """Input whitened by its covariance and output by its curvature E[δ δᵀ]: a Kronecker-factored Fisher norm."""
    return Metric(roots(_present(statistics.output_curvature)), roots(_present(statistics.input_covariance)))


def _present(statistic: torch.Tensor | None) -> torch.Tensor:
    if statistic is None:
        raise ValueError("the statistics lack what the basis needs; collect them with find_basis(name).needs")
    return statistic


def _diagonal(weights: torch.Tensor | None, ridge: float) -> torch.Tensor:
    """Return sqrt(weights + ridge · mean): a channel that never fires must not make the metric singular."""
    positive = _present(weights).double()
    scale = float(positive.mean()) or 1.0
    return (positive + max(ridge, 1e-12) * scale).sqrt()


def decompose(
    weight: torch.Tensor, statistics: LayerStatistics, basis: str, ridge: float, roots: Roots | None = None
) -> Spectrum:
    """Decompose a weight [m, n] into k = min(m, n) components in float64; the result is float32.

    P B is the weight to fp32 rounding. `roots` shares the factorisations of covariances between layers, and knows the
    ridge each of them took.
    """
    metric = find_basis(basis).metric(statistics, Roots(ridge) if roots is None else roots)
    left, right = (None if side is None else side.to(weight.device) for side in (metric.left, metric.right))
    double = weight.detach().double()
    rowwise = double if left is None else (left[:, None] * double if left.ndim == 1 else left.T @ double)
    both = rowwise if right is None else rowwise * right if right.ndim == 1 else rowwise @ right
    if weight.shape[0] >= weight.shape[1]:
        P, B, sigma = _tall(both, right)
    else:
        P, B, sigma = _wide(both, rowwise)
    return Spectrum(_undo_left(P, left).float(), B.float(), sigma.float())


def _tall(both: torch.Tensor, right: Transform) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose M [m, n], m ≥ n, by the eigenvectors V of MᵀM: P = M V, B = Vᵀ C⁻¹.

    V is orthogonal to machine precision whatever the spectrum, so P B is exact; and σ = ‖M v‖ is as accurate as v,
    where the root of an eigenvalue would be lost below 1e-8 of the largest.
    """
    vectors = torch.linalg.eigh(both.T @ both).eigenvectors
    scaled = both @ vectors
    sigma, order = scaled.norm(dim=0).sort(descending=True)
    rows = vectors.T[order]
    if right is not None:
        rows = rows / right if right.ndim == 1 else torch.linalg.solve_triangular(right, rows, upper=False, left=False)
    return scaled[:, order], rows, sigma


def _wide(both: torch.Tensor, rowwise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decompose M [m, n], m < n, by the eigenvectors U of MMᵀ: P = U Σ, B = Σ⁻¹ Uᵀ RᵀW, where C has cancelled."""
    vectors = torch.linalg.eigh(both @ both.T).eigenvectors
    sigma, order = (vectors.T @ both).norm(dim=1).sort(descending=True)
    vectors = vectors[:, order]
    # A component of a rank-deficient weight has σ = 0: any other positive number leaves the product as it is.
    split = sigma.clamp_min(max(float(sigma[0]) * 1e-12, 1e-300))
    return vectors * split, (vectors.T @ rowwise) / split[:, None], sigma


def _undo_left(P: torch.Tensor, left: Transform) -> torch.Tensor:
    if left is None:
        return P
    return P / left[:, None] if left.ndim == 1 else torch.linalg.solve_triangular(left.T, P, upper=True)


def decompose_model(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    tokens: torch.Tensor,
    train: TrainSettings,
    store: SpectrumStore,
    notify: Notify = silent,
) -> None:
    """Collect the statistics that the basis of `train` needs and decompose every layer into `store`.

    A group of layers at a time, so that the sums of a 7B model need no memory that training does not need later; what
    is in `store` when this is interrupted is whole. tokens: calibration blocks [n, t]. Errors as `collect_statistics`
    and `decompose_layers`.
    """
    needs = find_basis(train.basis).needs
    parts = groups(linears, needs)
    for number, part in enumerate(parts):
        tell = _as_part(notify, number, parts)
        # no name for the statistics: they are gone before the next group's are collected
        decompose_layers(
            part,
            collect_statistics(model, part, tokens[: train.statistics_blocks], needs, tell),
            train.basis,
            train.ridge,
            store,
            tell,
        )


def _as_part(notify: Notify, number: int, parts: Sequence[Mapping[str, nn.Linear]]) -> Notify:
    """Let the events of one part count as steps of the whole: each part takes all batches, and its own layers."""
    done, layers = sum(map(len, parts[:number])), sum(map(len, parts))

    def tell(event: Event) -> None:
        if event.stage == "spectrum":
            notify(replace(event, step=done + event.step, total=layers))
        else:
            notify(replace(event, step=number * event.total + event.step, total=len(parts) * event.total))

    return tell


def decompose_layers(
    linears: Mapping[str, nn.Linear],
    statistics: Mapping[str, LayerStatistics],
    basis: str,
    ridge: float,
    store: SpectrumStore,
    notify: Notify = silent,
) -> None:
    """Decompose every layer into `store`; an event per layer carries its name and the ridge where it had to grow.

    Raises DataError naming the layer whose weight is not finite, RecipeError for an unknown basis.
    """
    matrices = find_basis(basis).needs & {"input_covariance", "output_curvature"}
    roots = Roots(ridge)
    for step, (name, linear) in enumerate(linears.items(), start=1):
        if not bool(linear.weight.isfinite().all()):
            raise DataError("the weight holds NaN or Inf", fix="fetch the model again", where=f"{name}.weight")
        store.put(name, decompose(linear.weight, statistics[name], basis, ridge, roots))
        used = [roots.ridge_of(_present(getattr(statistics[name], matrix))) for matrix in matrices]
        grown = {"ridge": max(used)} if max(used, default=ridge) > ridge else {}
        notify(Event("spectrum", step, len(linears), {"layer": name, **grown}))
