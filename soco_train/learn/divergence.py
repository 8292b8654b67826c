"""Mean divergence of a student's predictions from a teacher's, a chunk of tokens at a time."""

from __future__ import annotations

from typing import Any

import torch

from soco_train.learn.teacher import TopPredictions


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
        shares: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """student: [T, V], teacher: [T, V] or [T, k], labels: [T] (-100: not scored) → (loss, KL), both scalars.

        shares: [T], what each token's part of the loss is multiplied by, not the KL that is returned; None: 1.
        """
        gradient = torch.empty_like(student)
        total = torch.zeros((), device=student.device, dtype=torch.float64)
        loss = torch.zeros_like(total)
        scored = max(1, int((labels >= 0).sum()))
        for part in torch.arange(len(student), device=student.device).split(chunk):
            window = slice(int(part[0]), int(part[-1]) + 1)
            log_q = student[window].float().log_softmax(-1)
            log_p = _log_p(teacher, window, log_q)
            p, gap = log_p.exp(), log_p.sub_(log_q)
            own = gap.mul_(p).sum(1, dtype=torch.float64)
            total += own.sum()
            own /= len(student)
            kept = labels[window] >= 0
            target = labels[window].clamp(min=0)[:, None]
            if weight:
                own -= log_q.gather(1, target).squeeze(1).where(kept, 0) * (weight / scored)
            q = log_q.exp_()  # in place, here and above: such a table is what memory and most of the time go to
            pull = p.sub_(q).div_(-len(student))
            if weight:
                towards = q.scatter_add_(1, target, -torch.ones_like(target, dtype=q.dtype))
                pull += towards.mul_(kept[:, None] * (weight / scored))
            if shares is not None:
                own, pull = own * shares[window], pull.mul_(shares[window, None])
            loss += own.sum()
            gradient[window] = pull.to(gradient.dtype)
        ctx.save_for_backward(gradient)
        return loss.float(), (total / len(student)).float()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None, None]:
        """Scale the gradient kept by the forward pass."""
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0].to(gradient.dtype), None, None, None, None, None


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
    shares: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss, KL) of logits [b, t, V] over all positions; CE is on the next token of `tokens`: [b, t].

    shares: [b, t], what each position's part of the loss is multiplied by; None: 1.
    """
    labels = torch.full_like(tokens, -100)
    labels[:, :-1] = tokens[:, 1:]
    if isinstance(teacher, TopPredictions):
        teacher = TopPredictions(teacher.log_p.flatten(0, -2), teacher.index.flatten(0, -2))
    else:
        teacher = teacher.flatten(0, -2)
    each = None if shares is None else shares.flatten()
    loss, kl = ChunkedDivergence.apply(student.flatten(0, -2), teacher, labels.flatten(), ce_weight, chunk, each)
    return loss, kl.detach()
