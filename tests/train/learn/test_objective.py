"""The chunked loss against the textbook one in float64, value and gradient; the soft size against counting."""

import pytest
import torch
from torch.nn import functional

from soco_train.learn.divergence import divergence
from soco_train.scores.size import SoftSize, polarisation, soft_gate
from soco_train.settings.plan import PlanSettings


@pytest.mark.parametrize("ce_weight", [0.0, 0.7])
@pytest.mark.parametrize("chunk", [1, 5, 1000])
def test_divergence_matches_the_textbook(ce_weight: float, chunk: int) -> None:
    student = (3 * torch.randn(2, 9, 17)).requires_grad_()
    teacher, tokens = 3 * torch.randn(2, 9, 17), torch.randint(17, (2, 9))
    loss, kl = divergence(student, teacher, tokens, ce_weight, chunk)
    loss.backward()
    reference = student.detach().double().requires_grad_()
    expected_kl = functional.kl_div(
        reference.log_softmax(-1).flatten(0, 1),
        teacher.double().log_softmax(-1).flatten(0, 1),
        reduction="batchmean",
        log_target=True,
    )
    entropy = functional.cross_entropy(reference[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    expected = expected_kl + ce_weight * entropy
    expected.backward()
    assert float(kl) == pytest.approx(float(expected_kl), rel=1e-5)
    assert float(loss) == pytest.approx(float(expected), rel=1e-5)
    assert torch.allclose(student.grad, reference.grad.float(), atol=1e-6)


@pytest.mark.parametrize("storage", ["stacked", "pivoted"])
def test_soft_size_of_decided_gates_is_the_stored_size(storage: str) -> None:
    shapes, ranks = [(8, 6), (4, 10)], [6, 4]
    gates = torch.tensor([1, 1, 0, 0, 0, 0, 1, 0, 0, 0], dtype=torch.float32)
    first, second = (2 * 14, 14) if storage == "stacked" else (2 * 12, 13)
    together, each = (
        SoftSize(shapes, ranks, PlanSettings(storage=storage, allocation=allocation), False, torch.device("cpu"))
        for allocation in ("global", "uniform")
    )
    assert together(gates).tolist() == pytest.approx([(first + second) / (48 + 40)])
    assert each(gates).tolist() == pytest.approx([first / 48, second / 40])
    assert float(each.whole(each(gates))) == pytest.approx(float(together.whole(together(gates))))


def test_the_size_of_all_layers_pulls_a_gate_alike_however_many_budgets_there_are() -> None:
    shapes, ranks = [(8, 6), (4, 10)], [6, 4]
    pulls = []
    for allocation in ("global", "uniform"):
        size = SoftSize(shapes, ranks, PlanSettings(allocation=allocation), True, torch.device("cpu"))
        gates = torch.linspace(0, 1, 10, requires_grad=True)
        size.whole(size(gates)).backward()
        pulls.append(gates.grad)
    torch.testing.assert_close(*pulls)


def test_full_gates_cost_no_more_than_dense_and_still_feel_pressure() -> None:
    size = SoftSize([(8, 6)], [6], PlanSettings(), deviation=True, device=torch.device("cpu"))
    gates = torch.ones(6, requires_grad=True)
    value = size.whole(size(gates))
    value.backward()
    assert float(value) == 1.0
    assert (gates.grad > 0).all()


def test_polarisation_is_zero_only_when_decided() -> None:
    assert float(polarisation(torch.tensor([0.0, 1.0, 1.4]))) == 0.0
    assert float(polarisation(torch.tensor([0.5]))) == 1.0
    assert float(soft_gate(torch.tensor(0.5), 0.5, 0.1)) == 0.5
