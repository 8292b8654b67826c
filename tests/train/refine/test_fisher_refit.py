"""Weighted low-rank fits against what is known of them in float64: rows by least squares, rank-one weights, descent."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from soco_train.events import Event
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.refine.fisher_refit import fisher_refit, row_spread, weighted_error, weighted_fit
from soco_train.refine.rungs import RUNGS
from soco_train.settings.data import LayerSettings
from soco_train.settings.refine import RefitSettings
from tests.support.models import small_llama

CLOSE = RefitSettings(blocks=1, weights="fisher", sweeps=1, ridge=1e-12)


def cut(weight: torch.Tensor, rank: int) -> StackedFactors:
    """Return the plain SVD's factors."""
    u, sigma, v = torch.linalg.svd(weight, full_matrices=False)
    return StackedFactors((u[:, :rank] * sigma[:rank]).float(), v[:rank].float(), None)


def by_hand(weight: torch.Tensor, fisher: torch.Tensor, up: torch.Tensor, down: torch.Tensor):
    """Return one turn: each row of `up`, then each column of `down`, as a least-squares problem of its own."""
    solve = torch.linalg.lstsq
    root = fisher.sqrt()
    up = torch.stack(
        [solve((down * own).T, (own * row)[:, None]).solution[:, 0] for own, row in zip(root, weight, strict=True)]
    )
    columns = zip(root.T, weight.T, strict=True)
    return up, torch.stack([solve(up * own[:, None], (own * row)[:, None]).solution[:, 0] for own, row in columns], 1)


@pytest.mark.parametrize(("m", "n", "r"), [(9, 14, 4), (14, 9, 4), (6, 6, 1)])
def test_a_turn_is_weighted_least_squares_row_by_row_and_column_by_column(m: int, n: int, r: int) -> None:
    weight, fisher = torch.randn(m, n).double(), torch.rand(m, n).double() + 0.05
    factors = StackedFactors(torch.randn(m, r), torch.randn(r, n), torch.randn(m))
    found = weighted_fit(weight, fisher, factors, CLOSE)
    up, down = by_hand(weight, fisher, factors.up.double(), factors.down.double())
    torch.testing.assert_close(found.up.double() @ found.down.double(), up @ down, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert found.bias is factors.bias


def test_with_weights_of_rank_one_it_finds_the_best_there_is() -> None:
    """F = u vᵀ is the one case with a closed form: the SVD of √u W √v."""
    weight = torch.randn(12, 10).double()
    rows, columns = (torch.rand(12).double() + 0.2), (torch.rand(10).double() + 0.2)
    sigma = torch.linalg.svdvals(rows.sqrt()[:, None] * weight * columns.sqrt())
    fisher = torch.outer(rows, columns)
    settings = RefitSettings(blocks=1, weights="fisher", sweeps=400, ridge=1e-9)
    found = weighted_fit(weight, fisher, cut(weight, 3), settings)
    assert weighted_error(weight, fisher, found) == pytest.approx(float(sigma[3:].square().sum()), rel=1e-3)
    assert weighted_error(weight, fisher, cut(weight, 3)) > 1.001 * float(sigma[3:].square().sum())


@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_no_turn_raises_the_error_and_many_end_where_the_gradient_is_nought(ridge: float) -> None:
    weight, fisher = torch.randn(10, 12).double(), torch.rand(10, 12).double() ** 4
    factors, errors = cut(weight, 4), []
    for _ in range(6):
        factors = weighted_fit(weight, fisher, factors, CLOSE.model_copy(update={"ridge": ridge}))
        errors.append(weighted_error(weight, fisher, factors))
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(errors))
    settings = CLOSE.model_copy(update={"ridge": 1e-6, "sweeps": 2000})
    last = weighted_fit(weight, fisher, factors, settings)
    residual = fisher * (weight - last.up.double() @ last.down.double())
    for gradient, part in ((residual @ last.down.double().T, last.up), (last.up.double().T @ residual, last.down)):
        assert float(gradient.norm()) < 2e-3 * float(part.norm()) * float((fisher * weight).norm()), (
            "a stationary point"
        )


def test_what_nothing_is_known_of_stays() -> None:
    weight, fisher = torch.randn(8, 6).double(), torch.rand(8, 6).double()
    fisher[3] = 0
    factors = cut(weight, 2)
    only_up = weighted_fit(weight, fisher, factors, RefitSettings(blocks=1, weights="fisher", sweeps=1))
    nothing = weighted_fit(weight, torch.zeros(8, 6).double(), factors, CLOSE)
    torch.testing.assert_close(nothing.up @ nothing.down, factors.up @ factors.down, rtol=1e-4, atol=1e-5)
    assert bool(only_up.up.isfinite().all())


def test_the_spread_is_nought_where_one_weight_a_row_says_it_all() -> None:
    rows = torch.rand(5, 1).double() + 0.1
    assert row_spread(rows.expand(5, 7)) == pytest.approx(0, abs=1e-12)
    two = torch.tensor([[1.0, 3.0], [0.0, 0.0]]).double()
    assert row_spread(two) == pytest.approx(0.5), "of the rows that anything is known of"
    assert row_spread(torch.zeros(2, 2)) == 0


def test_the_rung_lowers_every_layers_weighted_error_and_says_so(tmp_path: Path) -> None:
    model = small_llama()
    linears = select_linears(model, LayerSettings())
    tokens = torch.randint(64, (6, 16))
    subject = Subject(model, linears, {}, tokens)
    factors = {name: cut(linear.weight.detach(), 5) for name, linear in linears.items()}
    events: list[Event] = []
    settings = RefitSettings(blocks=4, weights="fisher", sweeps=3)
    found = RUNGS["refit"].run(subject, factors, settings, Session(tmp_path, events.append))
    assert list(found) == list(factors)
    assert [event.step for event in events] == list(range(1, len(factors) + 1))
    assert all(event.values["after"] < event.values["before"] for event in events)
    name = events[0].values["layer"]
    x, delta = gradients(model, linears[name], tokens[:4])
    fisher = delta.square().T @ x.square()
    error = weighted_error(linears[name].weight.detach().double(), fisher, found[name])
    whole = float((fisher * linears[name].weight.detach().square()).sum())
    assert events[0].values["after"] == pytest.approx(error / whole, rel=1e-3)
    assert not fisher_refit(model, linears, {}, tokens, settings)


def gradients(model: nn.Module, linear: nn.Linear, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a layer's inputs [T, n] and the gradients of the summed next-token loss in its outputs [T, m]."""
    kept: list[torch.Tensor] = []

    def keep(_: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        kept.extend((args[0], output))

    handle = linear.register_forward_hook(keep)
    logits = model.requires_grad_(True)(input_ids=tokens).logits[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum").backward()
    handle.remove()
    return kept[0].detach().flatten(0, 1).double(), kept[1].grad.flatten(0, 1).double()
