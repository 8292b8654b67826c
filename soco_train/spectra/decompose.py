"""Weight → P, B, σ: the singular components of a layer in a basis.

With M = Rᵀ W C = U Σ Vᵀ, R and C the basis's left and right transform, the components are P = R⁻ᵀ U Σ and B = Vᵀ C⁻¹,
so that P B = W exactly, and cutting the smallest σ is the best cut in the norm ‖Rᵀ ΔW C‖.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from soco_train.errors import DataError
from soco_train.events import Event, Notify, silent
from soco_train.settings.train import TrainSettings
from soco_train.spectra.bases import Roots, Transform, find_basis, present
from soco_train.spectra.statistics import LayerStatistics, collect_statistics, groups, hardly_seen
from soco_train.store.spectra import Spectrum, SpectrumStore


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

    As many layers at a time as `train.statistics_memory` has room for: by default the sums of a 7B model need no memory
    that training does not need later. What is in `store` when this is interrupted is whole. tokens: calibration blocks
    [n, t]. Errors as `collect_statistics` and `decompose_layers`.
    """
    needs = find_basis(train.basis).needs
    parts = groups(linears, needs, train.statistics_memory)
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

    An expert that too few tokens reach has nothing to be ranked by: it gets no spectrum, and the store says so. Raises
    DataError naming the layer whose weight is not finite, RecipeError for an unknown basis.
    """
    matrices = find_basis(basis).needs & {"input_covariance", "output_curvature"}
    roots = Roots(ridge)
    for step, (name, linear) in enumerate(linears.items(), start=1):
        if not bool(linear.weight.isfinite().all()):
            raise DataError("the weight holds NaN or Inf", fix="fetch the model again", where=f"{name}.weight")
        if hardly_seen(name, linear, statistics[name]):
            store.leave_out(name)
            continue
        store.put(name, decompose(linear.weight, statistics[name], basis, ridge, roots))
        used = [roots.ridge_of(present(getattr(statistics[name], matrix))) for matrix in matrices]
        grown = {"ridge": max(used)} if max(used, default=ridge) > ridge else {}
        notify(Event("spectrum", step, len(linears), {"layer": name, **grown}))
