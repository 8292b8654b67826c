"""Sparse codes are what they have to be: orthonormal, sparse, no dearer than stacked, never worse by a turn."""

import pytest
import torch

from benchmarks import sparse_codes as codes
from soco_train.errors import RecipeError
from soco_train.settings.plan import check_storage


def loss(weight: torch.Tensor, root: torch.Tensor, pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    return float(((weight - pair[0] @ pair[1]) @ root).square().sum())


@pytest.mark.parametrize(("m", "n", "atoms"), [(30, 12, 8), (10, 16, 14), (12, 12, 12)])
def test_codes_are_sparse_over_a_dictionary_that_is_orthonormal_in_the_metric(
    m: int, n: int, atoms: int, monkeypatch
) -> None:
    weight, root = torch.randn(m, n).double(), torch.randn(n, n).double().tril() + 4 * torch.eye(n).double()
    found, dictionary = codes.sparse_codes(weight, root, atoms)
    assert (found != 0).sum(1).tolist() == [atoms // 2] * m
    whitened = dictionary @ root
    torch.testing.assert_close(whitened @ whitened.T, torch.eye(atoms).double(), atol=1e-8, rtol=0)
    losses = []
    for turns in (0, 1, 5, 20):
        monkeypatch.setattr(codes, "TURNS", turns)
        losses.append(loss(weight, root, codes.sparse_codes(weight, root, atoms)))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    rest = float((weight @ root).square().sum()) - float(found.square().sum())
    assert losses[-1] == pytest.approx(rest), "what no code holds is lost, and nothing else"


@pytest.mark.parametrize("bits", [16.0, 4.5])
@pytest.mark.parametrize(("m", "n"), [(192, 192), (512, 192), (64, 192)])
def test_atoms_take_the_budget_and_no_more(m: int, n: int, bits: float) -> None:
    def cost(atoms: int) -> float:
        return bits * (atoms * n + m * atoms / 2) + m * atoms

    for share in (0.4, 0.8):
        atoms = codes.atoms_at(share, m, n, bits)
        assert cost(atoms) <= share * m * n * bits
        assert cost(atoms + 2) > share * m * n * bits or atoms == n // 2 * 2


def test_low_rank_is_the_best_there_is_in_the_metric() -> None:
    weight, root = torch.randn(9, 7).double(), torch.randn(7, 7).double().tril() + 3 * torch.eye(7).double()
    sigma = torch.linalg.svdvals(weight @ root)
    assert loss(weight, root, codes.low_rank(weight, root, 4)) == pytest.approx(float(sigma[4:].square().sum()))


def test_a_sparse_storage_is_refused_with_the_reason() -> None:
    with pytest.raises(RecipeError, match="makes sparse weights dense"):
        check_storage("sparse")
    with pytest.raises(RecipeError, match="unknown storage 'heap'"):
        check_storage("heap")


def test_int4_rounds_what_is_stored_and_no_zeros_between() -> None:
    stored = torch.randn(5, 64).double()
    spread = torch.zeros(5, 128).double()
    spread[:, ::2] = stored
    assert torch.equal(codes.as_stored(spread)[:, ::2], codes.as_stored(stored))
    assert torch.equal(codes.as_stored(stored), codes.rounded(stored.float(), codes.INT4))
