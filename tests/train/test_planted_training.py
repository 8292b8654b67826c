"""What every step of training is for: each test fails when that step is left out or turned around."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from soco_train.data.batches import batch_indices
from soco_train.forms.stacked import StackedFactors
from soco_train.learn import optimiser
from soco_train.modules.subject import Session
from soco_train.plan.ranks import kept
from soco_train.refine import distill as distillation
from soco_train.refine.compensate import compensated
from soco_train.refine.cut import _cut
from soco_train.refine.refit import Moments, solve
from soco_train.scores import acip, trainer
from soco_train.scores.closed_form import energy
from soco_train.scores.phases import Orders, StoppingRules, Timetable
from soco_train.scores.size import SoftSize
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import CompensateSettings, RefitSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra import decompose
from soco_train.store.scores import LayerScores


def pressed(weight):
    """Return the gradient that one step of phase 3 adds to θ, with λ_s = `weight` and no pressure on the size."""
    run = object.__new__(trainer.ScoreTraining)
    theta = nn.Parameter(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    theta.grad = torch.full((4,), 1e-3)
    run.train, run.plan = TrainSettings(), PlanSettings(keep_params=0.5)
    run.bank = SimpleNamespace(theta=theta, scores=lambda: theta)
    run.size = SoftSize([(4, 4)], [4], run.plan, False, theta.device)
    run._size_weights = lambda sizes, target: [0.0] * len(sizes)
    run._add_pressures(Orders(3, 0.5, weight, 0.1, frozen=False))
    return theta.grad - 1e-3


def test_polarisation_drives_scores_from_the_middle_to_their_ends():
    step = pressed(1.0)  # descent goes against it
    assert (step[:2] > 0).all(), "below a half, down to 0"
    assert (step[2:] < 0).all(), "above a half, up to 1"
    assert torch.equal(pressed(0.0), torch.zeros(4))


def test_phase_2_ends_at_peaks_of_the_size_and_not_at_valleys():
    orders, support = Orders(2, 0.5, 0.0, 1.0, False), torch.ones(8)
    peaks = [0.5, 0.6, 0.5, 0.55, 0.5]  # two peaks, with the same support
    rules = StoppingRules()
    done = [rules.done(orders, ratio, 0.5, support, 0.5) for ratio in peaks]
    assert done == [False, False, False, False, True]
    rules = StoppingRules()
    assert not any(rules.done(orders, ratio, 0.5, support, 0.5) for ratio in [0.6, 0.5, 0.6, 0.55, 0.56])


def test_the_final_support_ranks_above_everything():
    run = object.__new__(trainer.ScoreTraining)
    theta = torch.tensor([0.9, 0.05, 0.8, 0.0])
    support = torch.tensor([False, True, True, False])
    run.train, run.layers = TrainSettings(steps=10), {"a": torch.nn.Module()}
    run.bank = SimpleNamespace(
        theta=theta, function=lambda t: t, support=support, deviation=None, names=["a"],
        per_layer=lambda t: {"a": t},
    )  # fmt: skip
    run.died, run.restricted, run.step, run.shapes = torch.full((4,), math.inf), True, 10, [(4, 4)]
    found = run.scores().layers["a"]
    assert sorted(kept(found.importance, 2).tolist()) == [1, 2]
    assert found.scale.tolist() == pytest.approx([1.0, 0.05, 0.8, 1.0])


def test_the_learning_rate_falls_once_the_support_is_frozen():
    run = object.__new__(trainer.ScoreTraining)
    train = TrainSettings(steps=100)
    run.train, run.timetable = train, Timetable.preset(train)
    freeze, rates = run.timetable.freeze, []
    for run.step in range(100):
        rates.append(run._learning_rate())
    assert freeze < 100
    assert rates[freeze - 1] == 1.0
    assert rates[freeze:] == sorted(rates[freeze:], reverse=True)
    assert rates[-1] < 0.2


def test_compensation_is_its_formula_with_scores_that_are_not_1():
    rng = torch.Generator().manual_seed(0)
    root = 100 * torch.randn(5, 9, generator=rng, dtype=torch.float64)
    fisher, scale = (root @ root.T).float(), torch.tensor([0.3, 0.5, 0.7, 0.9, 0.2])
    keep = torch.tensor([0, 2])
    settings = CompensateSettings(ridge=0.3, ceiling=1e6)
    inner = fisher[keep][:, keep].double()
    inner = inner + 0.3 * inner.diagonal().mean() * torch.eye(2, dtype=torch.float64)
    step = torch.linalg.solve(inner, fisher[keep][:, [1, 3, 4]].double() @ scale[[1, 3, 4]].double())
    found = compensated(scale, keep, fisher, settings)
    assert found[keep].tolist() == pytest.approx((scale[keep] + step).clamp(min=0).tolist(), rel=1e-5)
    assert found[[1, 3, 4]].tolist() == scale[[1, 3, 4]].tolist()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.learnt = nn.Linear(3, 3)


def distilling(tmp_path, **settings):
    """Return a distillation whose model is never run: `_loss` is planted by the test."""
    settings = DistillSettings(**{"steps": 10, "batch_tokens": 8, "held_out_blocks": 2, **settings})
    subject = SimpleNamespace(tokens=torch.arange(24).reshape(6, 4), model=None)
    session = Session(tmp_path, lambda event: None)
    return distillation._Distillation(subject, settings, session, {"layer": Toy()}, teacher=lambda tokens: None)


def test_distillation_never_trains_on_what_it_holds_out(tmp_path):
    work = distilling(tmp_path)
    seen = {int(row[0]) for step in range(50) for row in work.batch(step)}
    assert seen == {0, 4, 8, 12}
    assert {int(row[0]) for row in work.held_out} == {16, 20}


def test_cross_entropy_has_the_weight_that_was_asked_for(monkeypatch, tmp_path):
    work, given = distilling(tmp_path, ce_weight=0.7), []
    work.model = lambda input_ids, use_cache: SimpleNamespace(logits=None)
    monkeypatch.setattr(distillation, "divergence", lambda s, t, tokens, weight, **rest: (given.append(weight), 0))
    work._loss(work.tokens, None)
    assert given == [0.7]


def test_gradients_are_clipped_and_the_rate_follows_its_curve(tmp_path):
    work, rates, norms = distilling(tmp_path, clip=0.5, lr=0.1), [], []

    def loss(tokens, size):
        total = 1e4 * sum(parameter.sum() for parameter in work.parameters.values())
        return total, total.detach()

    def stepping():
        rates.append(work.optimisers[0].param_groups[0]["lr"])
        norms.append(float(torch.cat([p.grad.flatten() for p in work.parameters.values()]).norm()))

    work._loss, work.optimisers[0].step = loss, stepping
    for _ in range(10):
        work.one_step()
    assert norms == pytest.approx([0.5] * 10, rel=1e-3)
    curve = [0.1 * optimiser.warmup_cosine(step, 10, work.settings.warmup) for step in range(10)]
    assert rates == pytest.approx(curve)
    assert rates[-1] < 0.5 * max(rates)


def test_refit_adds_the_bias_of_the_dense_layer():
    torch.manual_seed(0)
    dense = nn.Linear(4, 3)
    factors = StackedFactors(torch.randn(3, 2), torch.randn(2, 4), torch.zeros(3))
    x = torch.randn(50, 4, dtype=torch.float64)
    moments = Moments(x.T @ x / 50, x.T @ x / 50, x.mean(0), x.mean(0))
    found = solve(dense, factors, moments, RefitSettings())
    mean = x.mean(0).float()
    assert torch.allclose(found.up @ (found.down @ mean) + found.bias, dense(mean), atol=1e-5)


def test_cut_factors_are_as_large_on_both_sides():
    torch.manual_seed(0)
    P, B = 1e3 * torch.randn(6, 4), 1e-3 * torch.randn(4, 5)
    layer = LayerScores(torch.arange(4.0), torch.ones(4), None, (6, 5))
    found = _cut(SimpleNamespace(P=P, B=B), layer, 3, None)
    assert torch.allclose(found.up.norm(dim=0), found.down.norm(dim=1), rtol=1e-4)
    assert torch.allclose(found.up @ found.down, P[:, 1:] @ B[1:], rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9")
def test_muon_remembers_the_gradients_before():
    parameter = nn.Parameter(torch.zeros(3, 3))
    (muon,) = optimiser.optimisers("muon", [parameter], 0.1)
    steps = []
    for gradient in (torch.eye(3), -0.1 * torch.eye(3)):
        before = parameter.detach().clone()
        parameter.grad = gradient
        muon.step()
        steps.append(parameter.detach() - before)
    assert float((steps[0] * steps[1]).sum()) > 0, "one weak gradient does not turn it around"


def test_statistics_are_collected_on_as_many_blocks_as_asked(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        decompose, "collect_statistics", lambda model, part, tokens, needs, tell: seen.append(len(tokens)) or {}
    )
    monkeypatch.setattr(decompose, "decompose_layers", lambda *_, **__: None)
    train = TrainSettings(statistics_blocks=3)
    linears = {"a": nn.Linear(4, 4)}
    decompose.decompose_model(nn.Module(), linears, torch.zeros(9, 4), train, SimpleNamespace(), lambda event: None)
    assert seen == [3]


def test_every_epoch_has_an_order_of_its_own():
    epochs = [batch_indices(16, 16, step, seed=1) for step in range(4)]
    assert all(sorted(epoch) == list(range(16)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_energy_is_the_square_of_the_singular_value():
    task = SimpleNamespace(spectra={"a": SimpleNamespace(sigma=torch.tensor([3.0, 0.5]))}, linears=["a"])
    assert energy(task)["a"].tolist() == [9.0, 0.25]


def masks(step=0):
    run = object.__new__(acip._Masks)
    p = nn.Parameter(torch.tensor([0.5, 0.2, -0.1]))
    p.grad = torch.ones(3)
    run.masks, run.frozen, run.unit, run.step = [p], False, math.nan, step
    run.train = TrainSettings(steps=100)
    return run, p


def test_pressure_on_masks_grows_from_a_tenth_to_a_hundred_typical_gradients():
    for step, pressure in ((0, 0.1), (35, 10**0.5), (70, 100.0)):
        run, p = masks(step)
        run._press()
        assert p.grad.tolist() == pytest.approx([1 + pressure, 1 + pressure, 1.0])


def test_the_adapter_goes_into_the_factors_at_its_scale():
    layer = SimpleNamespace(p=torch.ones(2), C=torch.full((2, 1), 4.0), A=torch.ones(1, 3), beside=False)
    run = object.__new__(acip._Masks)
    run.train, run.died, run.step = TrainSettings(steps=10), torch.full((2,), math.inf), 10
    run.masks, run.layers, run.shapes = [layer.p], {"a": layer}, [(3, 3)]
    left, right = run.scores().layers["a"].correction
    assert torch.equal(left @ right, torch.full((2, 3), 4.0 * acip.ADAPTER_SCALE))
    assert acip.ADAPTER_SCALE == 0.5
