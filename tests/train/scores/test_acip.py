"""The ACIP-like control: its layer against plain float64, and a training that meets its budget, adapts and resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from soco_train.events import Event
from soco_train.modules.layers import select_linears
from soco_train.modules.masked import ADAPTER_RANK, ADAPTER_SCALE, MaskedLinear
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.cut import cut_layers
from soco_train.scores.acip import MASKS_STOP
from soco_train.scores.registry import train_scores
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.train import AcipSettings, TrainSettings
from soco_train.spectra.decompose import decompose_layers
from soco_train.spectra.statistics import LayerStatistics
from soco_train.store.scores import LayerScores, Scores
from soco_train.store.spectra import Spectrum, SpectrumStore
from tests.support.work import Work

STEPS = 20
TRAIN = TrainSettings(
    scorer="acip", basis="plain", steps=STEPS, batch_tokens=64, lr=0.02, lr_deviation=0.01, checkpoint_every=6
)


def spectrum(linear: nn.Linear) -> Spectrum:
    u, sigma, v = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
    return Spectrum(u * sigma, v, sigma)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("shape", [(7, 5), (5, 8)])
def test_the_mask_is_binary_forward_and_passes_its_gradient_straight_through(shape: tuple[int, int], beside) -> None:
    m, n = shape
    k = min(shape)
    linear = nn.Linear(n, m).double()
    layer = MaskedLinear(linear, spectrum(linear), torch.float64, seed=1, beside=beside).double()
    x = torch.randn(3, 4, n, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x), msg="all alive and no adapter yet: the dense layer")
    layer.p.data = torch.rand(k, dtype=torch.float64) - 0.5
    layer.p.data[:2] = torch.tensor([0.3, -0.3])
    layer.C.data.normal_()
    mask = (layer.p.detach() > 0).double().requires_grad_()
    adapter = (ADAPTER_SCALE * layer.C @ layer.A).detach()
    inner = x @ (layer.B if beside else layer.B + adapter).T
    expected = (inner * mask) @ layer.P.T + linear.bias + (x @ adapter.T if beside else 0)
    found = layer(x)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(layer.p.grad, torch.where(layer.p > 0, mask.grad * k**0.5, 0.0))


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.2)).eval()


def task(model: LlamaForCausalLM, folder: Path, keep: float = 0.5) -> tuple[Work, list[Event]]:
    linears = select_linears(model, LayerSettings())
    store = SpectrumStore(folder / "spectrum")
    decompose_layers(linears, dict.fromkeys(linears, LayerStatistics()), "plain", 0.0, store)
    tokens = torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(9))
    events: list[Event] = []
    plan = PlanSettings(keep_params=keep)
    return Work(Subject(model, linears, store, tokens), TRAIN, plan, Session(folder / "work", events.append)), events


def test_masks_die_under_pressure_until_the_budget_is_met_then_adapters_go_on(model, tmp_path: Path) -> None:
    work, events = task(model, tmp_path)
    before = model(input_ids=work.subject.tokens[:1]).logits
    scores = train_scores(*work)
    assert torch.equal(model(input_ids=work.subject.tokens[:1]).logits, before), "the model is left as it was"
    sizes = [event.values["hard"] for event in events]
    assert sizes[0] == 1.0
    assert sizes[-1] <= 0.5
    late = [event.values["loss"] for event in events if event.step > MASKS_STOP * STEPS]
    assert late[-1] < late[0]
    for layer in scores.layers.values():
        assert torch.equal(layer.scale, torch.ones_like(layer.scale))
        assert layer.deviation is None
    assert any(float(layer.correction[0].abs().max()) > 0 for layer in scores.layers.values())


def test_the_cut_is_the_support_and_the_adapter_in_it_and_costs_nothing(model, tmp_path: Path) -> None:
    work, _ = task(model, tmp_path)
    train_scores(*work).save(tmp_path / "scores.safetensors")
    scores = Scores.load(tmp_path / "scores.safetensors")
    plan = plan_ranks(scores, work.plan)
    assert plan.ratio <= 0.5
    factors = cut_layers(work.subject.spectra, scores, plan, work.subject.linears)
    assert factors
    for name, layer in plan.layers.items():
        alive = scores.layers[name].importance > 1
        assert int(alive.sum()) == layer.rank, "the masks stopped at what is cut; whoever died ranks below"
    for name, layer in factors.items():
        parts, own = work.subject.spectra[name], scores.layers[name]
        left, right = own.correction
        inner = parts.B.double() + left.double() @ right.double()
        alive = own.importance.topk(plan.layers[name].rank).indices
        expected = parts.P.double()[:, alive] @ inner[alive]
        assert layer.up.shape[1] == plan.layers[name].rank
        torch.testing.assert_close(layer.up.double() @ layer.down.double(), expected, rtol=0, atol=1e-5)


def test_the_published_adapter_stays_beside_the_support_and_its_ranks_are_counted(model, tmp_path: Path) -> None:
    work, events = task(model, tmp_path)
    train = TRAIN.model_copy(update={"acip": AcipSettings(adapter="beside")})
    train_scores(work.subject, train, work.plan, work.session).save(tmp_path / "scores.safetensors")
    scores = Scores.load(tmp_path / "scores.safetensors")
    plan = plan_ranks(scores, work.plan)
    assert plan.ratio <= 0.5
    factors = cut_layers(work.subject.spectra, scores, plan, work.subject.linears)
    for name, layer in factors.items():
        parts, own, rank = work.subject.spectra[name], scores.layers[name], plan.layers[name].rank
        alive = torch.nonzero(own.importance > 1).flatten()
        assert len(alive) == max(0, rank - ADAPTER_RANK), "the masks stopped at what is cut, adapter included"
        u, sigma, v = torch.linalg.svd(own.adapter[0].double() @ own.adapter[1].double(), full_matrices=False)
        room = min(rank, ADAPTER_RANK)
        expected = parts.P.double()[:, alive] @ parts.B.double()[alive] + u[:, :room] * sigma[:room] @ v[:room]
        assert layer.up.shape[1] == rank
        torch.testing.assert_close(layer.up.double() @ layer.down.double(), expected, rtol=0, atol=1e-5)
    assert factors
    late = [event.values["loss"] for event in events if event.step > MASKS_STOP * STEPS]
    assert late[-1] < late[0]


def test_recomputed_activations_learn_the_same_masks(model, tmp_path: Path) -> None:
    found = []
    for enabled in (False, True):
        work, _ = task(model, tmp_path / str(enabled))
        recomputing: list[bool] = []
        train = TRAIN.model_copy(update={"steps": 6, "checkpoint_activations": enabled})
        session = replace(work.session, notify=lambda _, seen=recomputing: seen.append(model.is_gradient_checkpointing))
        found.append(train_scores(work.subject, train, work.plan, session))
        assert recomputing == [enabled] * 6
    plain, lean = found
    for name, layer in plain.layers.items():
        torch.testing.assert_close(layer.importance, lean.layers[name].importance)
        torch.testing.assert_close(layer.correction, lean.layers[name].correction)
    assert not any(module.training for module in model.modules())


def test_a_killed_run_continues_to_the_same_bits(model, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.step == 15:
            raise Killed

    whole, _ = task(model, tmp_path / "whole")
    broken, _ = task(model, tmp_path / "broken")
    expected = train_scores(*whole)
    with pytest.raises(Killed):
        train_scores(*broken._replace(session=replace(broken.session, notify=kill)))
    resumed, events = task(model, tmp_path / "broken")
    found = train_scores(*resumed)
    assert [event.step for event in events] == list(range(13, STEPS + 1))
    for name, layer in expected.layers.items():
        assert torch.equal(layer.importance, found.layers[name].importance)
        assert all(map(torch.equal, layer.correction, found.layers[name].correction))


def test_scores_without_a_correction_are_read_back_without_one(tmp_path: Path) -> None:
    Scores({"a": LayerScores(torch.ones(2), torch.ones(2), None, (3, 2))}).save(tmp_path / "scores")
    assert Scores.load(tmp_path / "scores").layers["a"].correction is None
