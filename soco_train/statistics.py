"""Calibration statistics of each layer, streamed: what its inputs look like and what its outputs matter for.

A basis names the statistics it needs (soco_train.spectrum); one pass over the calibration blocks collects them. Only
sums are kept, in float64, never activations. Layers that read the same tensor (q/k/v, gate/up) share one sum, and the
result holds the same tensor object for each of them, so that whoever factorises it can do so once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

INPUT_SIDE = frozenset({"input_covariance", "input_magnitude"})
OUTPUT_SIDE = frozenset({"output_curvature", "row_fisher"})


@dataclass(frozen=True)
class LayerStatistics:
    """Means over `tokens` calibration tokens, for a layer with weight [m, n]; None where nobody asked.

    input_covariance: E[x xᵀ] [n, n]; input_magnitude: E|x| [n]; output_curvature: E[δ δᵀ] [m, m] with δ the gradient of
    the summed cross entropy with respect to the layer's output at one token; row_fisher: Σ_j E[(δ_i x_j)²] [m], the
    empirical Fisher information of each row of the weight. All float64.
    """

    input_covariance: torch.Tensor | None = None
    input_magnitude: torch.Tensor | None = None
    output_curvature: torch.Tensor | None = None
    row_fisher: torch.Tensor | None = None
    tokens: int = 0
