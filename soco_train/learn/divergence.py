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
