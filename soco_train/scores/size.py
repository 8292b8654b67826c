"""How small and how decided the scores are: two of the three terms SoCo balances.

    L_inc = KL(dense ‖ compressed)     L_dec = relu(R̂ - R)     L_sp = mean 4 u (1 - u)

where g(s) = sigmoid((s - τ)/κ) counts a component in R̂ and u(s) = min(s, 1) is how decided it is. Where every layer
has to keep the same share (`allocation: uniform`) L_dec is the mean of relu(R̂_l - R) over layers, by parameters.
"""

from __future__ import annotations

import torch

from soco_train.forms.registry import find_form
from soco_train.settings.plan import PlanSettings


class SoftSize:
    """R̂: the stored size, relative to dense, that the scores are heading for; one figure for each budget.

    A budget is what `plan.allocation` divides freely: all layers together, or, if uniform, every layer by itself.
    shapes: (m, n) per layer; ranks: [k] per layer; a kept deviation counts m numbers. What a rank costs is the storage
    form's to say. The value has the dense fallback, min(cost, mn); the gradient passes it
    straight through, or layers that are cheaper dense could never become smaller.

    spans: [budgets], how many components each has; shares: [budgets], its part of all parameters.
    """

    def __init__(
        self, shapes: list[tuple[int, int]], ranks: list[int], plan: PlanSettings, deviation: bool, device: torch.device
    ) -> None:
        parts = [1] * len(ranks) if plan.allocation == "uniform" else [len(ranks)]  # layers in each budget
        self.budget = torch.repeat_interleave(torch.arange(len(parts)), torch.tensor(parts)).to(device)
        self.layer = torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)).to(device)
        self.spans = torch.bincount(self.budget[self.layer]).tolist()
        self.sides = torch.tensor(shapes, dtype=torch.float32, device=device).T
        self.area = torch.tensor([float(m * n) for m, n in shapes], device=device)
        self.shift = torch.tensor([float(m if deviation else 0) for m, _ in shapes], device=device)
        self.cost = find_form(plan.storage).cost
        self.full = torch.zeros(len(parts), device=device).index_add(0, self.budget, self.area)
        self.shares = self.full / self.area.sum()

    def __call__(self, gates: torch.Tensor) -> torch.Tensor:
        """gates: [Σk] in [0, 1] → R̂: [budgets]."""
        rank = torch.zeros_like(self.area).index_add(0, self.layer, gates)
        cost = self.cost(rank, *self.sides) + self.shift
        excess = (cost - self.area).clamp(min=0).detach()
        return torch.zeros_like(self.shares).index_add(0, self.budget, cost - excess) / self.full

    def whole(self, sizes: torch.Tensor) -> torch.Tensor:
        """sizes: [budgets] → the size of all layers together, scalar."""
        return (sizes * self.shares).sum()


def soft_gate(s: torch.Tensor, threshold: float, temperature: float) -> torch.Tensor:
    """g(s) = sigmoid((s - τ)/κ)."""
    return torch.sigmoid((s - threshold) / temperature)


def polarisation(s: torch.Tensor) -> torch.Tensor:
    """Mean of 4 u (1 - u), u = min(s, 1): 1 when every score is ½, 0 when each is 0 or at least 1.

    Of the scores, not of the gates [ours]: once κ is small a gate is flat a few hundredths away from τ, and the many
    components at, say, 0.3, which still carry signal and are about to be cut, would never be pushed to 0.
    """
    u = s.clamp(0, 1)
    return (4 * u * (1 - u)).mean()
