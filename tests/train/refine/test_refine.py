"""The rungs after the cut, each against a plain reference: compensation, refit, distillation with early stop."""

import copy
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from soco_train.errors import DataError
from soco_train.events import Event, silent
from soco_train.forms.dense import DenseWeight
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.divergence import divergence
from soco_train.learn.easy import EasyPairs
from soco_train.modules.factored import factored
from soco_train.modules.layers import parked, select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.numbers.rate import bits_per_weight
from soco_train.numbers.rounding import rounded
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.compensate import SKIPPED, compensate, compensated, score_fisher
from soco_train.refine.cut import cut_layers
from soco_train.refine.distill import distill
from soco_train.refine.refit import Moments, refit, solve
from soco_train.scores.registry import train_scores
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import CompensateSettings, RefitSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.decompose import decompose_model
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore
from tests.support.models import make_model, small_llama

HAS_MUON = hasattr(torch.optim, "Muon")
TRAIN = TrainSettings(scorer="singular-values", basis="whitened")
PLAN = PlanSettings(keep_params=0.5, allocation="uniform")


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(3)
    return small_llama(attention_bias=True)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(64, (24, 16), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def subject(model, tokens, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    linears = select_linears(model, LayerSettings())
    store = SpectrumStore(tmp_path_factory.mktemp("spectrum"))
    decompose_model(model, linears, tokens, TRAIN, store, silent)
    return Subject(model, linears, store, tokens)


@pytest.fixture(scope="module")
def cut(subject: Subject, tmp_path_factory: pytest.TempPathFactory):
    work = tmp_path_factory.mktemp("work")
    scores = train_scores(subject, TRAIN, PLAN, Session(work))
    plan = plan_ranks(scores, PLAN)
    return scores, plan, cut_layers(subject.spectra, scores, plan, subject.linears)


class PositionScored(nn.Module):
    """A Linear whose scores are another leaf at every position: autograd then gives each position's gradient."""

    def __init__(self, linear: nn.Linear, P: torch.Tensor, B: torch.Tensor, positions: int) -> None:
        super().__init__()
        self.linear, self.P, self.B = linear, P, B
        self.s = torch.ones(1, positions, P.shape[1], requires_grad=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.s * (x @ self.B.T)) @ self.P.T + self.linear.bias


def test_the_fisher_matrix_is_that_of_each_positions_gradient(subject, cut, tokens) -> None:
    scores, name = cut[0], "model.layers.0.mlp.up_proj"
    linear = subject.linears[name]
    biased = nn.Linear(linear.in_features, linear.out_features)
    biased.weight, biased.bias = linear.weight, nn.Parameter(torch.zeros(linear.out_features))
    spectrum, total = subject.spectra[name], 0
    for sequence in tokens[:3]:
        layer = PositionScored(biased, spectrum.P, spectrum.B, len(sequence))
        subject.model.get_submodule("model.layers.0.mlp").up_proj = layer
        logits = subject.model(input_ids=sequence[None]).logits[0, :-1]
        nn.functional.cross_entropy(logits, sequence[1:], reduction="sum").backward()
        subject.model.get_submodule("model.layers.0.mlp").up_proj = linear
        gradient = layer.s.grad[0].double()
        total = total + gradient.T @ gradient
    # The objective averages over scored positions, len - 1, and the caller multiplies by len.
    expected = total / (3 * tokens.shape[1]) * (tokens.shape[1] / (tokens.shape[1] - 1)) ** 2
    found = score_fisher(subject.model, {name: linear}, subject.spectra, scores, tokens[:3])[name]
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


def test_the_fisher_matrix_of_a_bfloat16_model_is_close_to_that_of_float32(subject, cut, tokens) -> None:
    expected = score_fisher(subject.model, subject.linears, subject.spectra, cut[0], tokens[:3])
    half = copy.deepcopy(subject.model).to(torch.bfloat16)
    found = score_fisher(half, select_linears(half, LayerSettings()), subject.spectra, cut[0], tokens[:3])
    for name, matrix in expected.items():
        assert float((found[name] - matrix).norm()) < 0.05 * float(matrix.norm())


def test_compensation_minimises_the_second_order_cost() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(9, 9, generator=generator, dtype=torch.float64)
    fisher = root @ root.T + 9 * torch.eye(9, dtype=torch.float64)
    survivors = torch.tensor([0, 2, 3, 7])
    settings = CompensateSettings(blocks=1, ridge=1e-9, ceiling=100)
    moved = compensated(torch.ones(9), survivors, fisher, settings).double()

    def cost(at: torch.Tensor) -> float:
        step = torch.zeros(9, dtype=torch.float64)
        step[survivors] = at
        return float((step - 1) @ fisher @ (step - 1))

    best = cost(moved[survivors])
    for index in range(4):
        for nudge in (-0.01, 0.01):
            other = moved[survivors].clone()
            other[index] += nudge
            assert cost(other) > best
    assert best < cost(torch.ones(4, dtype=torch.float64))


def test_compensation_moves_survivors_only_and_stays_under_its_ceiling(subject, cut) -> None:
    scores, plan, _ = cut
    found = compensate(subject, scores, plan, CompensateSettings(blocks=4, ridge=1e-3, ceiling=1.05))
    changed = 0
    for name, layer in found.layers.items():
        assert torch.equal(layer.importance, scores.layers[name].importance)
        assert float(layer.scale.min()) >= 0
        assert float(layer.scale.max()) <= 1.05
        changed += int((layer.scale != scores.layers[name].scale).sum())
    assert changed


@pytest.mark.parametrize(
    "learnt",
    [
        {"scale": torch.full((32,), 1.1)},
        {"deviation": torch.zeros(48)},
        {"correction": (torch.zeros(32, 2), torch.zeros(2, 32))},
    ],
    ids=["scale", "deviation", "correction"],
)
def test_trained_scores_are_not_compensated_again_and_the_reason_is_told(subject, cut, learnt: dict) -> None:
    scores, plan, _ = cut
    name = "model.layers.0.mlp.up_proj"
    trained = Scores({**scores.layers, name: replace(scores.layers[name], **learnt)})
    events: list[Event] = []
    assert compensate(subject, trained, plan, CompensateSettings(blocks=4), events.append) is trained
    assert [event.values for event in events] == [{"": SKIPPED}]


def test_the_scores_of_a_training_are_not_compensated(subject, tmp_path: Path) -> None:
    train = TrainSettings(scorer="soco", steps=4, batch_tokens=64, lr=0.1)
    scores = train_scores(subject, train, PLAN, Session(tmp_path))
    events: list[Event] = []
    assert compensate(subject, scores, plan_ranks(scores, PLAN), CompensateSettings(blocks=4), events.append) is scores
    assert events


def reference(weight, down, x_dense, x, alpha):
    """Return the least-squares `up` for a held `down`."""
    target = (alpha * x + (1 - alpha) * x_dense) @ weight.T
    return torch.linalg.lstsq(x @ down.T, target).solution.T


@pytest.mark.parametrize("alpha", [0.0, 0.75, 1.0])
def test_refit_of_one_layer_is_least_squares(alpha: float) -> None:
    torch.manual_seed(int(alpha * 4))
    dense = nn.Linear(12, 9, bias=False)
    x = torch.randn(400, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)
    x_dense = x + 0.3 * torch.randn_like(x)
    factors = StackedFactors(torch.randn(9, 4), torch.randn(4, 12), None)
    moments = Moments(x.T @ x / 400, x_dense.T @ x / 400, x.mean(0), x_dense.mean(0))
    found = solve(dense, factors, moments, RefitSettings(blocks=1, own_input=alpha, ridge=1e-12))
    weight = dense.weight.detach().double()
    up = reference(weight, factors.down.double(), x_dense, x, alpha)
    torch.testing.assert_close(found.up.double(), up, rtol=1e-4, atol=1e-5)
    target = (alpha * x + (1 - alpha) * x_dense) @ weight.T

    def loss(up: torch.Tensor, down: torch.Tensor) -> float:
        return float((x @ down.double().T @ up.double().T - target).square().mean())

    assert loss(found.up, found.down) <= loss(up, factors.down) * (1 + 1e-6)
    assert loss(up, factors.down) < loss(factors.up, factors.down)


def test_without_data_refit_changes_nothing() -> None:
    dense = nn.Linear(12, 9)
    factors = StackedFactors(torch.randn(9, 4), torch.randn(4, 12), None)
    nothing = Moments(*(torch.zeros(*shape, dtype=torch.float64) for shape in ((12, 12), (12, 12), (12,), (12,))))
    found = solve(dense, factors, nothing, RefitSettings(blocks=1))
    torch.testing.assert_close(found.up, factors.up, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.down, factors.down, rtol=1e-4, atol=1e-5)


def inputs_of(model: nn.Module, module: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    caught = []
    handle = module.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        model(input_ids=tokens)
    handle.remove()
    return torch.cat(caught).flatten(0, 1).double()


def test_refit_sees_the_inputs_that_the_pruned_model_will_have(subject, cut, tokens) -> None:
    model, name = subject.model, "model.layers.1.mlp.down_proj"
    settings = RefitSettings(blocks=len(tokens))
    found = refit(model, subject.linears, cut[2], tokens, settings)
    x_dense = inputs_of(model, subject.linears[name], tokens)
    with factored(model, subject.linears, {**found, name: cut[2][name]}) as layers:
        x = inputs_of(model, layers[name], tokens)  # the last layer: all before it are as refit leaves them
    moments = Moments(x.T @ x / len(x), x_dense.T @ x / len(x), x.mean(0), x_dense.mean(0))
    expected = solve(subject.linears[name], cut[2][name], moments, settings)
    product = found[name].up @ found[name].down
    torch.testing.assert_close(product, expected.up @ expected.down, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", ["llama-scaled", "opt", "qwen3", "mistral"])
def test_refit_brings_other_families_closer_to_their_dense_layers(family: str, tmp_path: Path) -> None:
    model = make_model(family)
    linears = select_linears(model, LayerSettings())
    tokens = torch.randint(4, 250, (16, 24), generator=torch.Generator().manual_seed(1))
    store = SpectrumStore(tmp_path / "spectrum")
    plain = TRAIN.model_copy(update={"basis": "plain"})
    decompose_model(model, linears, tokens, plain, store, silent)
    scores = train_scores(Subject(model, linears, store, tokens), plain, PLAN, Session(tmp_path / "work"))
    factors = cut_layers(store, scores, plan_ranks(scores, PLAN), linears)

    def error(factors) -> float:
        with torch.no_grad():
            dense = model(input_ids=tokens).logits
            with factored(model, linears, factors):
                return float((model(input_ids=tokens).logits - dense).square().mean())

    assert error(refit(model, linears, factors, tokens, RefitSettings(blocks=16))) < error(factors)


def distillation(subject: Subject, folder: Path, **settings) -> tuple[tuple[DistillSettings, Session], list[Event]]:
    events: list[Event] = []
    defaults = {"steps": 30, "batch_tokens": 64, "lr": 3e-3, "held_out_blocks": 4, "evaluate_every": 5, "patience": 2}
    return (DistillSettings(**defaults | settings), Session(folder, events.append, "task")), events


def held_out(events: list[Event]) -> list[float]:
    return [float(event.values["held-out loss"]) for event in events if "held-out loss" in event.values]


def test_distillation_ends_when_the_held_out_loss_does_and_returns_the_best(subject, cut, tmp_path: Path) -> None:
    task, events = distillation(subject, tmp_path, lr=3.0)  # nothing but harm
    found = distill(subject, cut[2], *task)
    losses = held_out(events)
    assert len(losses) == 3
    assert min(losses) == losses[0]
    assert max(event.step for event in events) == 10
    for name, layer in found.items():
        assert torch.equal(layer.up, cut[2][name].up)


@pytest.mark.parametrize(
    "optimiser", ["adamw", pytest.param("muon", marks=pytest.mark.skipif(not HAS_MUON, reason="PyTorch before 2.9"))]
)
def test_an_interrupted_distillation_remembers_its_best(subject, cut, optimiser: str, tmp_path: Path) -> None:
    settings = {"checkpoint_every": 4, "lr": 2e-2, "patience": 9, "optimiser": optimiser}
    whole, events = distillation(subject, tmp_path / "whole", **settings)
    expected = distill(subject, cut[2], *whole)
    part, _ = distillation(subject, tmp_path / "part", **settings)

    def interrupt(event: Event) -> None:
        if event.step == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(subject, cut[2], part[0], replace(part[1], notify=interrupt))
    found = distill(subject, cut[2], *part)
    losses = held_out(events)
    assert min(losses) < losses[0]
    for name, layer in found.items():
        torch.testing.assert_close(layer.up, expected[name].up, rtol=1e-4, atol=1e-6)


def test_holding_everything_out_is_refused(subject, cut, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none is left"):
        distill(subject, cut[2], *distillation(subject, tmp_path, held_out_blocks=24)[0])


def test_distilling_from_remembered_predictions_is_distilling_from_the_model(subject, cut, tmp_path: Path) -> None:
    settings = {"steps": 4, "evaluate_every": 2, "lr": 1e-3}
    expected = distill(subject, cut[2], *distillation(subject, tmp_path / "afresh", **settings)[0])
    remembering, events = distillation(subject, tmp_path / "kept", **settings, teacher_top=64)
    shared = (remembering[0], replace(remembering[1], remember_in=tmp_path / "shared"))
    for task in (remembering, shared, shared):
        found = distill(subject, cut[2], *task)
        for name, layer in expected.items():
            assert torch.allclose(found[name].up, layer.up, atol=1e-5)
            assert torch.allclose(found[name].down, layer.down, atol=1e-5)
    assert events
    assert len(list((tmp_path / "kept").glob("teacher-*/*.safetensors"))) > 0
    assert len(list((tmp_path / "shared").glob("*.safetensors"))) > 0


def test_once_its_predictions_are_remembered_the_dense_model_is_not_asked(
    subject, cut, tmp_path: Path, monkeypatch
) -> None:
    task, events = distillation(subject, tmp_path, steps=4, teacher_top=64)
    asked = []
    for linear in subject.linears.values():
        answer = linear.forward
        monkeypatch.setattr(linear, "forward", lambda x, answer=answer: asked.append(len(events)) or answer(x))
    distill(subject, cut[2], *task)
    parts = [event for event in events if event.stage == "teacher"]
    assert [event.step for event in parts] == [1, 2, 3, 4, 5], "what is held out, and four batches"
    assert len(asked) > 0
    assert max(asked) < 5, "each answer is older than the last of those events"
    asked.clear()
    distill(subject, cut[2], *task)
    assert not asked, "and it is not asked again"


@pytest.mark.parametrize("dense", [False, True])
def test_what_is_trained_is_the_model_as_all_of_it_will_be_rounded(subject, cut, dense: bool, tmp_path: Path) -> None:
    rounding = RoundingSettings(weights="int4", block=16, keep=("*.o_proj",), dense=dense)
    settings = {"evaluate_every": 10, "lr": 3e-3, "patience": 9, "rounding": rounding}
    task, events = distillation(subject, tmp_path, **settings)
    found = distill(subject, {name: layer for name, layer in cut[2].items() if not name.endswith(".v_proj")}, *task)
    assert {name.endswith(".v_proj") for name in found} == {False, dense}

    stored = copy.deepcopy(subject.model)
    for name, linear in subject.linears.items():
        layer = found.get(name, DenseWeight(linear.weight, linear.bias))
        parts = [layer.weight] if isinstance(layer, DenseWeight) else [layer.up, layer.down]
        parts = parts if name.endswith("o_proj") else [rounded(part, rounding) for part in parts]
        stored.get_submodule(name).weight.data = parts[0] @ parts[1] if len(parts) == 2 else parts[0]
        if layer.bias is not None:
            stored.get_submodule(name).bias.data = layer.bias
    last = subject.tokens[-4:]
    with torch.no_grad():
        expected, _ = divergence(stored(input_ids=last).logits, subject.model(input_ids=last).logits, last)
    losses = held_out(events)
    assert min(losses) == pytest.approx(float(expected), rel=1e-4), "what was trained is what runs"
    learnt = [float(event.values["kl"]) for event in events if "kl" in event.values]
    assert sum(learnt[-5:]) < 0.9 * sum(learnt[:5]), "and it was trained"


def test_a_price_on_bits_leaves_fewer_of_them(subject, cut, tmp_path: Path) -> None:
    rounding = RoundingSettings(weights="int4", block=16)
    taken = {}
    for rate in (0.0, 5.0):
        task, _ = distillation(subject, tmp_path / f"{rate:g}", rounding=rounding, rate=rate, lr=3e-3, steps=20)
        found = distill(subject, cut[2], *task).values()
        parts = [part for layer in found for part in vars(layer).values() if part is not None and part.dim() == 2]
        taken[rate] = [float(bits_per_weight(part, rounding)) for part in parts]
    assert statistics.mean(taken[5.0]) < statistics.mean(taken[0.0]) - 0.1
    with pytest.raises(ValueError, match="rate prices the numbers"):
        DistillSettings(rate=1)


def test_a_foretold_token_counts_for_less(subject, cut, tmp_path: Path) -> None:
    # twelve words of five letters, each in two sequences, and letters by chance: within a word the next is foretold
    words = 5 * torch.randperm(12).repeat(2)[:, None] + torch.arange(12) % 5
    text = replace(subject, tokens=torch.cat([words, torch.randint(64, (24, 4))], dim=1))
    task, events = distillation(text, tmp_path, steps=1, evaluate_every=1, easy=0.75)
    distill(text, cut[2], *task)
    last, shares = text.tokens[-4:], EasyPairs.of(text.tokens[:-4]).weights(text.tokens[-4:], 0.75)
    with torch.no_grad():
        dense = subject.model(input_ids=last).logits
        with factored(subject.model, subject.linears, cut[2]):
            student = subject.model(input_ids=last).logits
    expected, whole = divergence(student, dense, last, shares=shares)
    assert held_out(events)[0] == pytest.approx(float(expected), rel=1e-4)
    assert float(expected) < 0.9 * float(whole)


class Moved(torch.nn.Linear):
    """A Linear that notes where it is sent; one with a bias refuses to leave."""

    def cpu(self) -> torch.nn.Linear:
        self.moves = ["cpu"]
        if self.bias is not None:
            raise RuntimeError("no room")
        return self

    def to(self, device: torch.device) -> torch.nn.Linear:
        self.moves = [*getattr(self, "moves", []), str(device)]
        return self


def test_parked_layers_leave_and_come_back_even_after_a_failure() -> None:
    layer, heavy = Moved(2, 3, bias=False, device="meta"), Moved(2, 3, device="meta")
    with parked([layer]):
        assert layer.moves == ["cpu"]
    assert layer.moves == ["cpu", "meta"]
    with pytest.raises(ValueError, match="inside"), parked([layer]):
        raise ValueError("inside")
    assert layer.moves == ["cpu", "meta"]
    with pytest.raises(RuntimeError, match="no room"), parked([layer, heavy]):
        pytest.fail("they cannot be parked")
    assert layer.moves == ["cpu", "meta"]
