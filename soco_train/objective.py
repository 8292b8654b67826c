"""The three terms SoCo balances: stay close to the dense model, become small, make up your mind.

    L_inc = KL(dense ‖ compressed)     L_dec = relu(R̂ - R)     L_sp = mean 4 u (1 - u)

where g(s) = sigmoid((s - τ)/κ) counts a component in R̂ and u(s) = min(s, 1) is how decided it is. Where every layer
has to keep the same share (`allocation: uniform`) L_dec is the mean of relu(R̂_l - R) over layers, by parameters.
"""

from __future__ import annotations

from typing import Any

import torch

from soco_train.settings import PlanSettings
from soco_train.teacher import TopPredictions


class ChunkedDivergence(torch.autograd.Function):
    """Mean over tokens of KL(teacher ‖ student) + weight · CE(labels), in fp32, a chunk of tokens at a time.

    The gradient, (softmax(student) - target)/N, is computed in the same pass and kept in the dtype of the logits:
    no fp32 copy of all logits ever exists.
    """

    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        teacher: torch.Tensor | TopPredictions,
        labels: torch.Tensor,
        weight: float,
        chunk: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """student: [T, V], teacher: [T, V] or [T, k], labels: [T] (-100: not scored) → (loss, KL), both scalars."""
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device, dtype=torch.float64)
        entropy = torch.zeros_like(total)
        scored = max(1, int((labels >= 0).sum()))
        for part in torch.arange(len(student), device=student.device).split(chunk):
            window = slice(int(part[0]), int(part[-1]) + 1)
            log_q = student[window].float().log_softmax(-1)
            log_p = _log_p(teacher, window, log_q)
            p, gap = log_p.exp(), log_p.sub_(log_q)
            total += gap.mul_(p).sum(dtype=torch.float64)
            kept = labels[window] >= 0
            target = labels[window].clamp(min=0)[:, None]
            if weight:
                entropy -= log_q.gather(1, target).squeeze(1)[kept].sum(dtype=torch.float64)
            q = log_q.exp_()  # in place, here and above: such a table is what memory and most of the time go to
            pull = p.sub_(q).div_(-len(student))
            if weight:
                towards = q.scatter_add_(1, target, -torch.ones_like(target, dtype=q.dtype))
                pull += towards.mul_(kept[:, None] * (weight / scored))
            gradient[window] = pull.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        divergence = total / len(student)
        return (divergence + weight * entropy / scored).float(), divergence.float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        """Scale the gradient kept by the forward pass."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None


def _log_p(teacher: torch.Tensor | TopPredictions, window: slice, log_q: torch.Tensor) -> torch.Tensor:
    if isinstance(teacher, TopPredictions):
        return TopPredictions(teacher.log_p[window], teacher.index[window]).completed(log_q)
    return teacher[window].float().log_softmax(-1)


def divergence(
    student: torch.Tensor,
    teacher: torch.Tensor | TopPredictions,
    tokens: torch.Tensor,
    ce_weight: float = 0.0,
    chunk: int = 2048,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, KL) of logits [b, t, V] over all positions; CE is on the next token of `tokens`: [b, t]."""
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    if isinstance(teacher, TopPredictions):
        teacher = TopPredictions(teacher.log_p.flatten(0, -2), teacher.index.flatten(0, -2))
    else:
        teacher = teacher.flatten(0, -2)
    loss, kl = ChunkedDivergence.apply(student.flatten(0, -2), teacher, labels.flatten(), ce_weight, chunk)
    return loss, kl.detach()


class SoftSize:
    """R̂: the stored size, relative to dense, that the scores are heading for; one figure for each budget.

    A budget is what `plan.allocation` divides freely: all layers together, or, if uniform, every layer by itself.
    shapes: (m, n) per layer; ranks: [k] per layer; a kept deviation counts m numbers. Stacked storage costs r(m+n) per
    layer, pivoted r(m+n-r) (arXiv 2501.19090). The value has the dense fallback, min(cost, mn); the gradient passes it
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
        self.width = torch.tensor([float(m + n) for m, n in shapes], device=device)
        self.area = torch.tensor([float(m * n) for m, n in shapes], device=device)
        self.shift = torch.tensor([float(m if deviation else 0) for m, _ in shapes], device=device)
        self.pivoted = plan.storage == "pivoted"
        self.full = torch.zeros(len(parts), device=device).index_add(0, self.budget, self.area)
        self.shares = self.full / self.area.sum()

    def __call__(self, gates: torch.Tensor) -> torch.Tensor:
        """gates: [Σk] in [0, 1] → R̂: [budgets]."""
        rank = torch.zeros_like(self.width).index_add(0, self.layer, gates)
        cost = rank * (self.width - rank) if self.pivoted else rank * self.width
        cost = cost + self.shift
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
