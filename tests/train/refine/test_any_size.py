"""Mixed-rank distillation: a prefix's gradients, the cut to a size, and what a training of all sizes promises."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional

from soco_train import method
from soco_train.errors import RecipeError
from soco_train.events import Event
from soco_train.forms.dense import DenseWeight
from soco_train.forms.stacked import StackedFactors
from soco_train.modules.factored import FactorPair, factored
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.any_size import cut_to, distill_any_size, prefix
from soco_train.refine.cut import cut_layers
from soco_train.refine.distill import Smaller
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import TrainSettings
from soco_train.store.scores import Scores
from tests.support.fresh import rng
from tests.support.models import small_llama

TRAIN = TrainSettings(scorer="singular-values", basis="whitened")
SIZES = (0.4, 0.9)


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Subject, Scores]:
    torch.manual_seed(int(rng().integers(1 << 30)))
    folder = tmp_path_factory.mktemp("subject")
    tokens = torch.randint(64, (24, 16))
    subject = method.open_subject(small_llama(attention_bias=True), LayerSettings(), tokens, folder / "spectrum")
    method.make_spectra(subject, TRAIN)
    return subject, method.learn_scores(subject, TRAIN, PlanSettings(), Session(folder / "work"))


def planner(scores: Scores):
    def plan(size: float) -> RankPlan:
        return plan_ranks(scores, PlanSettings(keep_params=size))

    return plan


def settings(**changes) -> DistillSettings:
    return DistillSettings(**{"steps": 6, "batch_tokens": 64, "lr": 3e-3, "sizes": SIZES, **changes})


def test_only_the_first_components_answer_and_learn() -> None:
    m, n, rank, some = 7, 9, 5, 3
    up, down, bias, x = (torch.randn(size, dtype=torch.float64) for size in ((m, rank), (rank, n), (m,), (4, n)))
    pair = FactorPair(StackedFactors(up, down, bias), torch.device("cpu"))
    pair.rank = some
    y = pair(x)
    assert torch.allclose(y, x @ (up[:, :some] @ down[:some]).T + bias, atol=1e-12)
    pull = torch.randn_like(y)
    y.backward(pull)
    # d/dU = gᵀ (x V), d/dV = Uᵀ gᵀ x for what takes part, and nothing for the rest
    expected_up, expected_down = torch.zeros_like(up), torch.zeros_like(down)
    expected_up[:, :some] = pull.T @ (x @ down[:some].T)
    expected_down[:some] = up[:, :some].T @ pull.T @ x
    assert torch.allclose(pair.up.grad, expected_up, atol=1e-12)
    assert torch.allclose(pair.down.grad, expected_down, atol=1e-12)
    assert torch.allclose(pair.bias.grad, pull.sum(0), atol=1e-12)


def test_a_step_descends_the_sum_of_both_losses(scored, tmp_path: Path) -> None:
    """One step of AdamW from nothing moves each number by lr against the sign of the gradient of the sum."""
    subject, scores = scored
    given = settings(steps=1, warmup=0, batch_tokens=subject.tokens.numel(), clip=1e9, lr=1e-3)
    session = Session(tmp_path / "work", seed=3)
    plan = planner(scores)
    done = distill_any_size(subject, scores, plan, given, session, {})
    before = distill_any_size(subject, scores, plan, given.model_copy(update={"steps": 0}), session, {})
    size = Smaller(SIZES, lambda _: {}, 3).size(0)
    assert SIZES[0] <= size <= SIZES[1]

    model = copy.deepcopy(subject.model).double()
    linears = {name: model.get_submodule(name) for name in subject.linears}
    teacher = model(input_ids=subject.tokens).logits.detach().log_softmax(-1)
    doubled = {
        name: StackedFactors(*(part if part is None else part.double() for part in vars(layer).values()))
        for name, layer in before.layers.items()
    }
    with factored(model, linears, doubled) as layers:
        total = 0.0
        for ranks in (None, plan(size)):
            for name, layer in layers.items():
                layer.learnt.rank = None if ranks is None else ranks.layers[name].rank
            student = model(input_ids=subject.tokens).logits.log_softmax(-1)
            total = total + functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
        total.backward()
        for name, layer in layers.items():
            for part in ("up", "down"):
                gradient = getattr(layer.learnt, part).grad
                moved = getattr(done.layers[name], part) - getattr(before.layers[name], part)
                clear = gradient.abs() > 1e-5
                assert clear.any()
                assert torch.equal(moved[clear].sign().double(), -gradient[clear].sign()), (name, part)


def test_every_size_is_a_prefix_of_the_same_factors_and_the_whole_range_is_all(scored, tmp_path: Path) -> None:
    subject, scores = scored
    plan = planner(scores)
    whole = distill_any_size(subject, scores, plan, settings(), Session(tmp_path), {})
    for size in (0.4, 0.63, 0.9):
        cut = cut_to(whole, plan(size))
        for name, planned in plan(size).layers.items():
            layer, all_of_it = cut.layers.get(name), whole.layers.get(name)
            if planned.dense:
                assert all_of_it is None or isinstance(layer, DenseWeight)
                continue
            assert torch.equal(layer.up, all_of_it.up[:, : planned.rank]), name
            assert torch.equal(layer.down, all_of_it.down[: planned.rank])
            assert (layer.bias is None) == (all_of_it.bias is None)
            assert layer.bias is None or torch.equal(layer.bias, all_of_it.bias)
            if size == SIZES[1]:
                assert torch.equal(layer.up, all_of_it.up)


def test_undistilled_a_prefix_is_the_cut_of_its_size(scored, tmp_path: Path) -> None:
    """In score order the first r components are the r survivors; a layer with all of them is the dense one."""
    subject, scores = scored
    plan = planner(scores)
    none = settings().model_copy(update={"steps": 0})
    whole = distill_any_size(subject, scores, plan, none, Session(tmp_path), {})
    for size in (0.4, 0.7, 0.9):
        found = cut_to(whole, plan(size)).layers
        for name, layer in cut_layers(subject.spectra, scores, plan(size), subject.linears).items():
            assert torch.allclose(found[name].up @ found[name].down, layer.up @ layer.down, atol=1e-5)
        for name, layer in found.items():
            if isinstance(layer, DenseWeight):
                assert torch.allclose(layer.weight, subject.linears[name].weight, atol=1e-4)


def test_resumed_it_draws_the_same_sizes(scored, tmp_path: Path) -> None:
    subject, scores = scored

    def stop(event: Event) -> None:
        if event.stage == "distill" and event.step == 4:
            raise KeyboardInterrupt

    given, plan = settings(checkpoint_every=3), planner(scores)
    whole = distill_any_size(subject, scores, plan, given, Session(tmp_path / "one", fingerprint="a"), {})
    with pytest.raises(KeyboardInterrupt):
        distill_any_size(subject, scores, plan, given, Session(tmp_path / "two", stop, "a"), {})
    again = distill_any_size(subject, scores, plan, given, Session(tmp_path / "two", fingerprint="a"), {})
    assert all(torch.equal(whole.layers[name].up, layer.up) for name, layer in again.layers.items())


def test_a_size_that_was_not_distilled_for_is_refused(scored, tmp_path: Path) -> None:
    subject, scores = scored
    plan = planner(scores)
    none = settings(sizes=(0.5, 0.7)).model_copy(update={"steps": 0})
    whole = distill_any_size(subject, scores, plan, none, Session(tmp_path), {})
    with pytest.raises(RecipeError, match="sizes"):
        cut_to(whole, plan(0.95))
    assert prefix(next(iter(whole.layers.values())), 2).down.shape[0] == 2


@pytest.mark.parametrize(
    "wrong",
    [
        {"distill": {"steps": 9, "sizes": (0.8, 0.4)}},
        {"distill": {"sizes": (0.4, 0.8)}},
        {"distill": {"steps": 9, "sizes": (0.4, 0.8), "rounding": {"weights": "int4"}}},
        {"distill": {"steps": 9, "sizes": (0.4, 0.8)}, "refit": {"blocks": 4}},
    ],
)
def test_what_does_not_go_with_it_is_refused(wrong: dict) -> None:
    with pytest.raises(ValidationError, match="sizes"):
        RefineSettings.model_validate(wrong)
