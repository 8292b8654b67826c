"""The tokens that a bigram table foretells, against a table counted by hand; the weighted loss against autograd."""

from collections import Counter
from itertools import pairwise

import pytest
import torch

from soco_train.learn.divergence import divergence
from soco_train.learn.easy import EasyPairs


def foretold(text: torch.Tensor) -> set[tuple[int, int]]:
    """Return the pairs that the rest of the text foretells: without one of its own, none follows as often."""
    counts = Counter((a, b) for row in text.tolist() for a, b in pairwise(row))
    found = set()
    for (a, b), count in counts.items():
        rest = counts.copy()
        rest[a, b] -= 1
        rivals = [rest[pair] for pair in counts if pair[0] == a and pair[1] != b]
        if count > 1 and count - 1 >= max(rivals, default=0):
            found.add((a, b))
    return found


@pytest.mark.parametrize("words", [2, 5, 40])
def test_easy_pairs_are_those_that_the_rest_of_the_text_foretells(words: int) -> None:
    text = torch.randint(words, (6, 20)) ** 2 // words  # some words more often than others
    found = EasyPairs.of(text)
    pairs = {(int(key) // found.size, int(key) % found.size) for key in found.keys}
    assert pairs == foretold(text)
    other = torch.randint(2 * words, (3, 9))
    expected = [[*(0.25 if pair in pairs else 1.0 for pair in pairwise(row)), 1.0] for row in other.tolist()]
    assert found.weights(other, 0.75).tolist() == expected


def test_a_text_without_repetition_has_no_easy_token() -> None:
    text = torch.randperm(60).reshape(4, 15)
    assert torch.equal(EasyPairs.of(text).weights(text, 1.0), torch.ones(4, 15))


@pytest.mark.parametrize("chunk", [1, 5, 100])
@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
def test_each_token_has_its_share_of_loss_and_gradient(ce_weight: float, chunk: int) -> None:
    tokens, shares = torch.randint(12, (2, 7)), torch.rand(2, 7)
    student, teacher = torch.randn(2, 7, 12, requires_grad=True), torch.randn(2, 7, 12)
    loss, kl = divergence(student, teacher, tokens, ce_weight, chunk, shares)
    loss.backward()
    same = student.detach().double().requires_grad_()
    p, log_q = teacher.double().softmax(-1), same.log_softmax(-1)
    each = (p * (p.log() - log_q)).sum(-1)
    following = -log_q[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    expected = (shares * each).mean() + ce_weight * (shares[:, :-1] * following).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert kl.item() == pytest.approx(each.mean().item(), rel=1e-5), "what is told is the whole divergence"
    torch.testing.assert_close(student.grad, same.grad.float(), rtol=1e-4, atol=1e-6)
