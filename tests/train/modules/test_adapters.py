"""Adapters beside factors against Kronecker products in float64, and merged against themselves in the model."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from soco_train.events import Event
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.divergence import divergence
from soco_train.modules.adapters import AdaptedPair, KroneckerSum, adapter_numbers
from soco_train.modules.factored import factored
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.refine.distill import distill
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import AdapterSettings, DistillSettings
from tests.support.models import small_llama

CPU = torch.device("cpu")


def trained(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module with all that is trained somewhere else than at its start."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn_like(parameter)
    return module


@pytest.mark.parametrize(("m", "n"), [(12, 8), (7, 10), (3, 5), (2, 9)])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_it_is_a_sum_of_kronecker_products(m: int, n: int, experts: int) -> None:
    adapter = trained(KroneckerSum((m, n), AdapterSettings(rank=2, experts=experts), seed=0))
    parts = zip(adapter.mix.double(), adapter.left.double(), adapter.right.double(), strict=True)
    expected = sum(torch.kron(mix, left @ right.T) for mix, left, right in parts)[:m, :n].detach()
    torch.testing.assert_close(adapter.matrix(), expected)
    x = torch.randn(3, 4, n)
    torch.testing.assert_close(adapter(x), (x.double() @ expected.T).float(), rtol=1e-4, atol=1e-4)


def test_experts_reach_ranks_that_lora_of_as_many_numbers_does_not() -> None:
    lora, alore = (trained(KroneckerSum((24, 16), AdapterSettings(rank=1, experts=k), seed=0)) for k in (1, 4))
    ranks = [int(torch.linalg.matrix_rank(adapter.matrix())) for adapter in (lora, alore)]
    assert ranks[0] == 1
    assert ranks[1] == 16
    numbers = [sum(part.numel() for part in adapter.parameters()) for adapter in (lora, alore)]
    assert numbers == [1 + 24 + 16, 64 + 24 + 16]


@pytest.mark.parametrize("experts", [1, 4])
def test_merged_it_computes_the_same_and_at_first_nothing_else(experts: int) -> None:
    factors = StackedFactors(torch.randn(12, 8), torch.randn(8, 16), torch.randn(12))
    settings = AdapterSettings(rank=2, experts=experts)
    pair = AdaptedPair(factors, CPU, settings, seed=3)
    x = torch.randn(5, 16)
    torch.testing.assert_close(pair(x), x @ factors.down.T @ factors.up.T + factors.bias)
    learnt = [part.numel() for part in pair.parameters() if part.requires_grad]
    assert sum(learnt) == adapter_numbers(12, 16, 8, settings)
    trained(pair)
    merged, double = pair.numbers(), pair.double()
    expected = double(x.double())
    found = (x.double() @ merged.down.double().T) @ merged.up.double().T + factors.bias
    assert (found - expected).norm().item() < 1e-6 * expected.norm().item()
    assert not torch.equal(merged.up, factors.up)


@pytest.mark.parametrize("experts", [1, 2])
def test_distillation_trains_the_adapters_alone_and_returns_them_merged(experts: int, tmp_path: Path) -> None:
    model = small_llama()
    linears = select_linears(model, LayerSettings())
    text = torch.randint(64, (10, 16))
    tokens = torch.cat([text, text[:2]])  # random blocks foretell no others: what is held out is learnt too
    subject = Subject(model, linears, {}, tokens)
    factors = {}
    for name, linear in linears.items():
        u, sigma, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        factors[name] = StackedFactors(u[:, :4] * sigma[:4], v[:4].contiguous(), None)
    events: list[Event] = []
    settings = DistillSettings(
        steps=30, batch_tokens=64, lr=2e-2, held_out_blocks=2, evaluate_every=10, checkpoint_every=7,
        adapter=AdapterSettings(rank=1, experts=experts),
    )  # fmt: skip

    def interrupt(event: Event) -> None:
        if event.step == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(subject, factors, settings, Session(tmp_path, interrupt, "task"))
    found = distill(subject, factors, settings, Session(tmp_path, events.append, "task"))
    whole = distill(subject, factors, settings, Session(tmp_path / "whole", events.append, "task"))
    losses = [float(event.values["held-out loss"]) for event in events if "held-out loss" in event.values]
    assert min(losses) < losses[-4], "it learns"
    with torch.no_grad():
        dense = model(input_ids=tokens[-2:]).logits
        with factored(model, linears, found):
            loss = float(divergence(model(input_ids=tokens[-2:]).logits, dense, tokens[-2:])[0])
    assert loss == pytest.approx(min(losses), rel=1e-4)
    for name, layer in found.items():
        torch.testing.assert_close(layer.up, whole[name].up, rtol=1e-4, atol=1e-6)
        assert int(torch.linalg.matrix_rank(layer.down - factors[name].down, rtol=1e-4)) <= experts**2


@pytest.mark.parametrize(
    "other", [{"sizes": (0.4, 0.8)}, {"shard": True}, {"optimiser": "muon"}, {"rounding": {"weights": "int4"}}]
)
def test_what_it_does_not_go_with_is_refused(other: dict) -> None:
    DistillSettings.model_validate({"steps": 1, **other})
    with pytest.raises(ValidationError, match=r"adapter\.rank needs"):
        DistillSettings.model_validate({"steps": 1, "adapter": {"rank": 2}, **other})
