"""Remembered predictions: the divergence from them against float64, and that the dense model is asked only once."""

from pathlib import Path

import pytest
import torch
from torch import nn

from soco_train.learn.divergence import divergence
from soco_train.learn.teacher import Teacher, TopPredictions

VOCABULARY = 23


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(2, 7, VOCABULARY, generator=torch.Generator().manual_seed(seed))


TOKENS = torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("top", [1, 6, VOCABULARY - 1, VOCABULARY, 1000])
@pytest.mark.parametrize("chunk", [4, 1000])
def test_the_rest_of_the_vocabulary_is_one_bucket(top: int, chunk: int) -> None:
    student = logits(1).requires_grad_()
    loss, kl = divergence(student, TopPredictions.of(logits(2), top), TOKENS, 0.7, chunk)
    loss.backward()

    reference = student.detach().double().requires_grad_()
    p, q = logits(2).double().softmax(-1), reference.softmax(-1)
    index = p.topk(min(top, VOCABULARY - 1)).indices
    buckets = [torch.cat([x.gather(-1, index), 1 - x.gather(-1, index).sum(-1, keepdim=True)], -1) for x in (p, q)]
    expected = (buckets[0] * (buckets[0].log() - buckets[1].log())).sum(-1).mean()
    assert float(kl) == pytest.approx(float(expected.detach()), rel=1e-5)
    expected = expected + 0.7 * nn.functional.cross_entropy(reference[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    expected.backward()
    assert torch.allclose(student.grad, reference.grad.float(), atol=1e-6)


def test_all_but_one_token_lose_nothing_and_fewer_see_less() -> None:
    student, teacher = logits(1), logits(2)
    whole = float(divergence(student, teacher, TOKENS)[1])
    seen = [float(divergence(student, TopPredictions.of(teacher, top), TOKENS)[1]) for top in (1, 4, 12, 22)]
    assert seen == sorted(seen)
    assert seen[-1] == pytest.approx(whole, rel=1e-5)


def test_a_certain_teacher_and_a_certain_student_have_a_finite_divergence() -> None:
    certain = torch.full((1, 2, VOCABULARY), -200.0)
    certain[..., 3] = 200.0
    student = certain.roll(1, -1).requires_grad_()
    loss, _ = divergence(student, TopPredictions.of(certain, 2), TOKENS[:1, :2])
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


def test_a_block_is_asked_for_once_whatever_batch_it_comes_in(tmp_path: Path) -> None:
    asked: list[torch.Tensor] = []

    def answer(tokens: torch.Tensor) -> torch.Tensor:
        asked.append(tokens)
        return nn.functional.one_hot(tokens, VOCABULARY).float() * 5

    teacher = Teacher(answer, 4, tmp_path)
    first = teacher(TOKENS)
    again = Teacher(answer, 4, tmp_path)(TOKENS.flip(0))
    assert isinstance(first, TopPredictions)
    assert isinstance(again, TopPredictions)
    assert torch.equal(again.log_p.flip(0), first.log_p)
    assert torch.equal(again.index.flip(0), first.index)
    teacher(torch.stack([TOKENS[0], TOKENS[1].flip(0)]))
    assert [len(tokens) for tokens in asked] == [2, 1]


def test_another_top_is_another_file(tmp_path: Path) -> None:
    few, more = (Teacher(lambda tokens: logits(3), top, tmp_path)(TOKENS) for top in (2, 5))
    assert isinstance(few, TopPredictions)
    assert isinstance(more, TopPredictions)
    assert (few.index.shape[-1], more.index.shape[-1]) == (2, 5)
