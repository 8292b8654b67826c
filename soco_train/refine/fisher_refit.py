"""Weighted low-rank fit of each pruned layer, a weight for every number of W (TFWSVD, arXiv 2211.09718).

    least Σ_ij F_ij (W - up · down)²_ij,    F_ij = E[(δ_i x_j)²], the empirical Fisher information of W_ij

No SVD solves that unless F is u vᵀ (FWSVD: one of the two is constant), so the factors are fitted in turns from the
cut, each row of `up` and each column of `down` by weighted least squares:

    a_i = (B D_i Bᵀ + λI)⁻¹ (B D_i w_i + λ a_i'),    D_i = diag(F_i), a_i' the present row

The pull λ, `ridge` times the mean diagonal, leaves a row as it is that nothing is known of; no turn raises the sum.
F is measured in the dense model, token by token [ours; published: text by text].
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from soco_train.events import Event, Notify, silent
from soco_train.forms.stacked import StackedFactors, balance
from soco_train.settings.refine import RefitSettings
from soco_train.spectra.bases import present
from soco_train.spectra.statistics import collect_statistics, groups

_NEEDS = frozenset({"weight_fisher"})
_AT_ONCE = 2**25  # numbers of the rows' matrices [r, r] that are solved at one time: 256 MB


def fisher_refit(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    factors: Mapping[str, StackedFactors],
    tokens: torch.Tensor,
    settings: RefitSettings,
    notify: Notify = silent,
) -> dict[str, StackedFactors]:
    """Return the factors fitted to W by the Fisher information of `settings.blocks` blocks of tokens [n, t].

    An event per layer says the spread of F within its rows, and the weighted error before and after, as shares of
    Σ F W². Raises DataError where gradients stop being finite.
    """
    found: dict[str, StackedFactors] = {}
    for group in groups({name: linears[name] for name in factors}, _NEEDS):
        statistics = collect_statistics(model, group, tokens[: settings.blocks], _NEEDS)
        for name, linear in group.items():
            weight, fisher = linear.weight.detach().double(), present(statistics[name].weight_fisher)
            found[name] = weighted_fit(weight, fisher, factors[name], settings)
            whole = float((fisher * weight.square()).sum()) or 1.0
            before, after = (weighted_error(weight, fisher, own) / whole for own in (factors[name], found[name]))
            spread = row_spread(fisher)
            told: dict[str, float | int | str] = {"layer": name, "spread": spread, "before": before, "after": after}
            notify(Event("refit", len(found), len(factors), told))
    return found


def weighted_fit(
    weight: torch.Tensor, fisher: torch.Tensor, factors: StackedFactors, settings: RefitSettings
) -> StackedFactors:
    """Return factors with a lower Σ F (W - up · down)² [m, n], in fp32; `factors` is where they start from."""
    up, down = factors.up.to(weight), factors.down.to(weight)
    for _ in range(settings.sweeps):
        up = _rows(weight, fisher, up, down, settings.ridge)
        down = _rows(weight.T, fisher.T, down.T, up.T, settings.ridge).T
    evened = balance(up, down)
    return StackedFactors((up * evened).float().cpu(), (down / evened[:, None]).float().cpu(), factors.bias)


def weighted_error(weight: torch.Tensor, fisher: torch.Tensor, factors: StackedFactors) -> float:
    """Return Σ F (W - up · down)²."""
    return float((fisher * (weight - factors.up.to(weight) @ factors.down.to(weight)).square()).sum())


def row_spread(fisher: torch.Tensor) -> float:
    """Return the mean over rows of the standard deviation of F within the row, in units of the row's mean.

    0: one weight a row says it all, and the weighted SVD of FWSVD's kind is exact.
    """
    mean = fisher.mean(1)
    seen = mean > 0
    return float((fisher[seen].std(1, correction=0) / mean[seen]).mean()) if bool(seen.any()) else 0.0


def _rows(
    weight: torch.Tensor, fisher: torch.Tensor, up: torch.Tensor, down: torch.Tensor, ridge: float
) -> torch.Tensor:
    """Return every row of `up` [m, r] fitted to the row of `weight` [m, n] with `down` [r, n] held."""
    pull = ridge * float((fisher.mean(0) * down.square()).sum(1).mean()) or 1.0
    damping = pull * torch.eye(len(down), dtype=down.dtype, device=down.device)
    weights, fishers, ups = (part.split(max(1, _AT_ONCE // len(down) ** 2)) for part in (weight, fisher, up))
    return torch.cat([_solved(*own, down, damping) for own in zip(weights, fishers, ups, strict=True)])


def _solved(
    weight: torch.Tensor, fisher: torch.Tensor, up: torch.Tensor, down: torch.Tensor, damping: torch.Tensor
) -> torch.Tensor:
    gram = torch.stack([(down * own) @ down.T for own in fisher]) + damping
    right = (weight * fisher) @ down.T + up @ damping
    return torch.linalg.solve(gram, right)
