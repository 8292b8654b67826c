"""The singular values of every pruned layer made more equal before its factors are trained (SVS, arXiv 2412.17387).

    up · down = U Σ Vᵀ   →   U c Σ^(1 - by) Vᵀ,    c such that the Frobenius norm stays

Published is by = 1/2, before fine-tuning and with the bias divided by √‖b‖. Ours: the norm is kept, the bias is left as
it is, for it carries the deviation, and both factors get the root of the new singular values.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from soco_train.forms.stacked import StackedFactors
from soco_train.modules.subject import Session, Subject
from soco_train.refine.rungs import rung
from soco_train.settings.refine import FlattenSettings


@rung("flatten", on="factors", switch="by")
def _flatten(
    subject: Subject, factors: Mapping[str, StackedFactors], settings: FlattenSettings, session: Session
) -> Mapping[str, StackedFactors]:
    return {name: flattened(layer, settings.by) for name, layer in factors.items()}


def flattened(factors: StackedFactors, by: float) -> StackedFactors:
    """Return factors [m, r], [r, n] whose product has the singular values σ^(1 - by), at the same Frobenius norm."""
    left, upper = torch.linalg.qr(factors.up.double())
    right, lower = torch.linalg.qr(factors.down.double().T)
    u, sigma, v = torch.linalg.svd(upper @ lower.T, full_matrices=False)
    flat = sigma ** (1 - by)
    root = (flat * sigma.norm() / flat.norm().clamp_min(1e-300)).sqrt()
    return StackedFactors((left @ u * root).float(), (root[:, None] * (v @ right.T)).float(), factors.bias)
