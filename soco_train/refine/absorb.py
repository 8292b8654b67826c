"""Fewer numbers a value head: what attention caches of each token is projected, and the projection absorbed.

Values v = W_v x are mixed over tokens and read by W_o, head by head. B_g [r, d] for each key-value head g goes into
W_v, and what reads B_g v instead of v into W_o: both products and the value cache shrink by r / d, no layer is added.

    W_v,g ← B_g W_v,g      W_o ← W_o C B̄ᵀ (B̄ C B̄ᵀ)⁻¹      B̄: of each query head the B of its g, on the diagonal

C is the covariance of o_proj's input, between heads too, so W_o is fitted to all of it. B_g holds the leading
eigenvectors of S^½ M S^½ times S^-½: S is the mean covariance of g's query heads, M = Σ_h W_o,hᵀ G W_o,h what matters
of them. That is the best B for a single head; heads of one g that differ in S have no closed form. LoRC
(arXiv:2410.03111) takes the SVD of W_v instead, which knows neither C nor G.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_FLOOR = 1e-10  # of the largest eigenvalue: directions that no value takes; far above float64's noise


@dataclass(frozen=True)
class AbsorbedValues:
    """Value projections B [groups, r, d], the output weight [m, heads · r] that reads them, and what is lost.

    lost: E‖G^½ (W_o a - W_o' B̄ a)‖² over the inputs a of o_proj.
    """

    down: torch.Tensor
    output: torch.Tensor
    lost: float

    def value(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the v_proj weight [groups · d, n] (or bias [groups · d]) that makes the projected values."""
        groups, rank, size = self.down.shape
        return (self.down @ weight.reshape(groups, size, -1).double()).reshape(groups * rank, *weight.shape[1:])

    def folded(self) -> torch.Tensor:
        """Return the weight [m, heads · d] on whole values that gives what `output` gives on projected ones."""
        return self.output @ _spread(self.down, self.output.shape[1] // self.down.shape[1])


def value_projections(
    output: torch.Tensor, covariance: torch.Tensor, curvature: torch.Tensor, groups: int, size: int, rank: int
) -> torch.Tensor:
    """Return B [groups, rank, size] for o_proj's weight [m, heads · size], with C and G in float64."""
    heads = output.shape[1] // size
    blocks = output.double().reshape(-1, heads, size)
    energy = torch.einsum("mhi,mn,nhj->hij", blocks, curvature, blocks)
    own = covariance.reshape(heads, size, heads, size).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    found = []
    for matters, spread in zip(energy.chunk(groups), own.chunk(groups), strict=True):
        values, vectors = torch.linalg.eigh(spread.mean(0))
        root = values.clamp(min=_FLOOR * float(values.max().clamp(min=1e-300))).sqrt()
        metric = (vectors * root).T @ matters.sum(0) @ (vectors * root)
        leading = torch.linalg.eigh(metric).eigenvectors[:, -rank:]
        found.append((leading.T / root) @ vectors.T)
    return torch.stack(found)


def absorb(
    output: torch.Tensor, covariance: torch.Tensor, curvature: torch.Tensor, down: torch.Tensor
) -> AbsorbedValues:
    """Return the output weight fitted to values that `down` [groups, r, d] projects; float64, nothing is changed."""
    weight = output.double()
    spread = _spread(down, weight.shape[1] // down.shape[2])
    seen = spread @ covariance
    fitted = weight @ seen.T @ torch.linalg.pinv(seen @ spread.T, hermitian=True)
    error = weight - fitted @ spread
    return AbsorbedValues(down, fitted, float(torch.einsum("mn,mi,ij,nj->", curvature, error, covariance, error)))


def _spread(down: torch.Tensor, heads: int) -> torch.Tensor:
    """Return B̄ [heads · r, heads · d]: of each query head the projection of its group, on the diagonal."""
    return torch.block_diag(*down.repeat_interleave(heads // len(down), 0))
