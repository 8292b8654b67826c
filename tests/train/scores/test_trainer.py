"""Score training on a small random model: it reaches its budget, it helps, it resumes to the same bits."""

import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from soco_export import signals
from soco_train import stopping
from soco_train.errors import DataError, RecipeError
from soco_train.events import Event
from soco_train.learn.divergence import divergence
from soco_train.modules.factored import factored
from soco_train.modules.layers import select_linears
from soco_train.modules.subject import Session, Subject
from soco_train.plan.ranks import kept, plan_ranks
from soco_train.refine.cut import cut_layers
from soco_train.refine.distill import distill
from soco_train.scores.closed_form import saliency
from soco_train.scores.registry import find_scorer, train_scores
from soco_train.scores.soco import attributed, wiener_start
from soco_train.settings.data import LayerSettings
from soco_train.settings.distill import DistillSettings
from soco_train.settings.plan import Allocation, PlanSettings
from soco_train.settings.train import PhaseSettings, TrainSettings
from soco_train.spectra.bases import find_basis
from soco_train.spectra.decompose import decompose_layers
from soco_train.spectra.statistics import collect_statistics
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore
from tests.support.models import small_llama
from tests.support.work import Work

STEPS = 30
TRAIN = TrainSettings(steps=STEPS, batch_tokens=64, lr=0.05, checkpoint_every=7, fisher_blocks=6)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(5)
    return small_llama(tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(64, (12, 16), generator=torch.Generator().manual_seed(9))


def task(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    folder: Path,
    train: TrainSettings = TRAIN,
    keep: float = 0.6,
    allocation: Allocation = "global",
) -> tuple[Work, list[Event]]:
    linears = select_linears(model, LayerSettings())
    store = SpectrumStore(folder / "spectrum")
    statistics = collect_statistics(model, linears, tokens, find_basis(train.basis).needs)
    decompose_layers(linears, statistics, train.basis, train.ridge, store)
    events: list[Event] = []
    plan = PlanSettings(keep_params=keep, storage="pivoted", allocation=allocation)
    return Work(Subject(model, linears, store, tokens), train, plan, Session(folder / "work", events.append)), events


@pytest.mark.parametrize("start", ["ones", "fisher"])
def test_the_size_reaches_the_budget_and_the_last_support_is_exact(model, tokens, tmp_path: Path, start: str) -> None:
    work, events = task(model, tokens, tmp_path, TRAIN.model_copy(update={"start": start}))
    scores = train_scores(*work)
    trained = [event for event in events if event.stage == "train"]
    assert [event.step for event in trained] == list(range(1, STEPS + 1))
    assert [event.values["phase"] for event in trained] == sorted(event.values["phase"] for event in trained)
    assert trained[-1].values["hard"] <= 0.6 + 0.02
    assert plan_ranks(scores, work.plan).ratio <= 0.6


def test_with_uniform_ranks_every_layer_meets_the_size_by_itself(model, tokens, tmp_path: Path) -> None:
    """Before the cut: the scores above τ are about as many as will be cut, in each layer."""
    train = TRAIN.model_copy(update={"steps": 60, "schedule": PhaseSettings(freeze=0)})
    work, events = task(model, tokens, tmp_path, train, allocation="uniform")
    scores = train_scores(*work)
    for name, layer in plan_ranks(scores, work.plan).layers.items():
        alive = int((scores.layers[name].scale > train.threshold).sum())
        assert abs(alive - layer.rank) <= 0.15 * min(layer.shape), name
    assert 0.5 < events[-1].values["soft"] < 0.65


def test_a_warm_start_with_uniform_ranks_begins_at_the_size_of_every_layer(model, tokens, tmp_path: Path) -> None:
    work, _ = task(model, tokens, tmp_path, allocation="uniform")
    found = saliency(work.subject, work.train)
    start = wiener_start(work.subject, work.train, work.plan, found)
    plan = plan_ranks(train_scores(*work._replace(train=TRAIN.model_copy(update={"scorer": "fisher"}))), work.plan)
    for name, layer in plan.layers.items():
        assert int((start[name] > 0.5).sum()) == layer.rank, name


@pytest.mark.parametrize("allocation", ["global", "uniform"])
def test_a_killed_run_continues_to_the_same_bits(model, tokens, tmp_path: Path, allocation: Allocation) -> None:
    whole, _ = task(model, tokens, tmp_path / "whole", allocation=allocation)
    expected = train_scores(*whole)

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.step == 29:  # inside the frozen finish, after a checkpoint made there
            raise Killed

    broken, _ = task(model, tokens, tmp_path / "broken", allocation=allocation)
    broken = broken._replace(session=replace(broken.session, notify=kill))
    with pytest.raises(Killed):
        train_scores(*broken)
    resumed, events = task(model, tokens, tmp_path / "broken", allocation=allocation)
    found = train_scores(*resumed)
    assert [event.step for event in events if event.stage == "train"] == [29, 30]
    for name, layer in expected.layers.items():
        assert torch.equal(layer.importance, found.layers[name].importance)
        assert torch.equal(layer.scale, found.layers[name].scale)
        assert torch.equal(layer.deviation, found.layers[name].deviation)


@pytest.mark.parametrize("last", [10, STEPS])
def test_a_signal_finishes_the_step_saves_it_and_loses_nothing(
    model, tokens, tmp_path: Path, monkeypatch, last
) -> None:
    """SIGTERM during step `last`: the checkpoint is of that step, and what is learnt in the end has the same bits."""
    monkeypatch.setattr(signals, "received", [])
    expected = train_scores(*task(model, tokens, tmp_path / "whole")[0])
    (subject, train, plan, session), _ = task(model, tokens, tmp_path / "stopped")

    def terminate(event: Event) -> None:
        if (event.stage, event.step) == ("train", last):
            signals._raise(signal.SIGTERM, None)

    with pytest.raises(KeyboardInterrupt):
        train_scores(subject, train, plan, replace(session, notify=terminate))
    resumed, events = task(model, tokens, tmp_path / "stopped")
    found = train_scores(*resumed)
    assert [event.step for event in events if event.stage == "train"] == list(range(last + 1, STEPS + 1))
    for name, layer in expected.layers.items():
        assert torch.equal(layer.importance, found.layers[name].importance)
        assert torch.equal(layer.scale, found.layers[name].scale)


def test_a_second_signal_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "received", [])
    with stopping.listening():
        signals._raise(signal.SIGTERM, None)
        with pytest.raises(KeyboardInterrupt):
            signals._raise(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):  # nothing trains: nothing is waited for
        signals._raise(signal.SIGTERM, None)


def test_a_size_that_cuts_nothing_trains_to_the_end(model, tokens, tmp_path: Path) -> None:
    train = TRAIN.model_copy(update={"steps": 6, "start": "ones", "deviation": False})
    work, events = task(model, tokens, tmp_path, train, keep=1.0)
    train_scores(*work)
    assert events[-1].step == 6


def test_another_task_does_not_continue_the_checkpoint(model, tokens, tmp_path: Path) -> None:
    first, _ = task(model, tokens, tmp_path)
    train_scores(*first)
    other, events = task(model, tokens, tmp_path, keep=0.5)
    train_scores(*other)
    assert len([event for event in events if event.stage == "train"]) == STEPS


def test_training_leaves_the_model_as_it_was(model, tokens, tmp_path: Path) -> None:
    before = model(input_ids=tokens[:1]).logits
    work, _ = task(model, tokens, tmp_path)
    train_scores(*work)
    assert torch.equal(model(input_ids=tokens[:1]).logits, before)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_saliency_is_the_mean_square_of_the_score_gradient(model, tokens, tmp_path: Path) -> None:
    """Against central differences of the loss in one component's score."""
    work, _ = task(model, tokens, tmp_path)
    name, at, step = "model.layers.1.mlp.down_proj", 2, 1e-2
    found = saliency(work.subject, work.train)[name][at]
    spectrum, linear = work.subject.spectra[name], work.subject.linears[name]
    component = torch.outer(spectrum.P[:, at], spectrum.B[at])
    weight = linear.weight.detach().clone()
    slopes = []
    with torch.no_grad():
        for sequence in tokens[:6, None]:
            losses = []
            for sign in (1, -1):
                linear.weight.copy_(weight + sign * step * component)
                losses.append(float(model(input_ids=sequence, labels=sequence).loss))
            slopes.append((losses[0] - losses[1]) / (2 * step))
        linear.weight.copy_(weight)
    assert float(found) == pytest.approx(sum(slope**2 for slope in slopes) / 12, rel=2e-2)


def test_phases_and_early_stopping(model, tokens, tmp_path: Path) -> None:
    schedule = PhaseSettings(phases=(1, 3), stop_early=True, reach=0.3)
    work, events = task(
        model, tokens, tmp_path, TRAIN.model_copy(update={"schedule": schedule, "steps": 100, "start": "fisher"})
    )
    train_scores(*work)
    trained = [event for event in events if event.stage == "train"]
    assert {event.values["phase"] for event in trained} == {1, 3}
    assert len(trained) < 100, "phase 1 ends after 20 quiet steps"


def test_a_loss_that_is_not_finite_is_a_clear_error(model, tokens, tmp_path: Path) -> None:
    work, _ = task(model, tokens, tmp_path)
    norm = model.model.norm.weight
    value = norm[0].item()
    with torch.no_grad():
        norm[0] = float("nan")
    try:
        with pytest.raises(DataError, match=r"loss is nan at step 0 of train, first in model\.norm"):
            train_scores(*work)
    finally:
        with torch.no_grad():
            norm[0] = value


def test_distillation_brings_the_factors_closer_and_resumes(model, tokens, tmp_path: Path) -> None:
    work, _ = task(model, tokens, tmp_path, TRAIN.model_copy(update={"scorer": "fisher"}))
    scores = train_scores(*work)
    factors = cut_layers(work.subject.spectra, scores, plan_ranks(scores, work.plan), work.subject.linears)
    events: list[Event] = []
    settings = DistillSettings(steps=20, batch_tokens=64, lr=3e-3, checkpoint_every=8)
    expected = distill(work.subject, factors, settings, Session(tmp_path / "a", events.append))
    assert events[-1].values["kl"] < 0.7 * events[0].values["kl"]

    class Killed(Exception):
        pass

    def kill(event: Event) -> None:
        if event.step == 11:
            raise Killed

    with pytest.raises(Killed):
        distill(work.subject, factors, settings, Session(tmp_path / "b", kill))
    found = distill(work.subject, factors, settings, Session(tmp_path / "b", events.append))
    for name, layer in expected.items():
        assert torch.equal(layer.up, found[name].up)
        assert torch.equal(layer.down, found[name].down)


def test_recomputed_activations_learn_the_same_scores(model, tokens, tmp_path: Path) -> None:
    plain, _ = task(model, tokens, tmp_path / "plain", TRAIN.model_copy(update={"steps": 6}))
    lean, _ = task(
        model, tokens, tmp_path / "lean", TRAIN.model_copy(update={"steps": 6, "checkpoint_activations": True})
    )
    expected, found = train_scores(*plain), train_scores(*lean)
    for name, layer in expected.layers.items():
        assert torch.allclose(layer.scale, found.layers[name].scale, atol=1e-6)
    assert not any(module.training for module in model.modules())


def test_attribution_takes_away_what_it_names_and_keeps_every_rank(model, tokens, tmp_path: Path) -> None:
    work, _ = task(model, tokens, tmp_path)
    learnt = train_scores(*work)
    plan = plan_ranks(learnt, work.plan)
    for switch in ("rescale", "select"):
        found = attributed(learnt, work.subject.spectra, TRAIN.model_copy(update={switch: False}))
        for name, layer in found.layers.items():
            before = learnt.layers[name]
            if switch == "rescale":
                assert torch.equal(layer.scale, torch.ones_like(before.scale))
                assert torch.equal(layer.importance, before.importance)
            else:
                assert torch.equal(kept(layer.importance, 5), torch.arange(5))  # σ falls, so the first survive
                assert torch.equal(layer.scale, before.scale)
        assert [layer.rank for layer in plan_ranks(found, work.plan).layers.values()] == [
            layer.rank for layer in plan.layers.values()
        ]


def test_a_larger_size_brings_components_back_as_they_were(model, tokens, tmp_path: Path) -> None:
    small = TRAIN.model_copy(update={"keep_params": 0.4, "start": "fisher"})
    work, _ = task(model, tokens, tmp_path, small, keep=0.9)
    scores = train_scores(*work)
    divergences = []
    for keep in (0.4, 0.9):
        plan = plan_ranks(scores, work.plan.model_copy(update={"keep_params": keep}))
        factors = cut_layers(work.subject.spectra, scores, plan, work.subject.linears)
        with torch.no_grad():
            dense = model(input_ids=tokens).logits
            with factored(model, work.subject.linears, factors):
                divergences.append(float(divergence(model(input_ids=tokens).logits, dense, tokens)[1]))
        for name, layer in scores.layers.items():
            survivors = kept(layer.importance, plan.layers[name].rank)
            if keep == 0.9:
                assert not (layer.scale[survivors] == 0).any()
    assert divergences[1] < 0.5 * divergences[0]


LEARNING = TRAIN.model_copy(update={"lr_factors": 3e-3, "start": "fisher"})


def test_components_that_learn_beside_their_scores_leave_less_divergence(model, tokens, tmp_path: Path) -> None:
    found = {}
    for name, train in {"frozen": LEARNING.model_copy(update={"lr_factors": 0.0}), "learnt": LEARNING}.items():
        work, events = task(model, tokens, tmp_path / name, train)
        scores = train_scores(*work)
        assert plan_ranks(scores, work.plan).ratio <= 0.6
        found[name] = sum(event.values["kl"] for event in events if event.stage == "train")
    assert found["learnt"] < 0.95 * found["frozen"]


def test_the_cut_takes_components_as_they_were_learnt(model, tokens, tmp_path: Path) -> None:
    work, _ = task(model, tokens, tmp_path, LEARNING)
    scores = train_scores(*work)
    name, planned = next((n, p) for n, p in plan_ranks(scores, work.plan).layers.items() if not p.dense)
    layer, spectrum = scores.layers[name], work.subject.spectra[name]
    P, B = layer.components
    assert float((P @ B - spectrum.P @ spectrum.B).abs().max()) > 1e-3
    survivors = kept(layer.importance, planned.rank)
    expected = (P[:, survivors].double() * layer.scale[survivors].double()) @ B[survivors].double()
    factors = cut_layers(work.subject.spectra, scores, plan_ranks(scores, work.plan), work.subject.linears)[name]
    torch.testing.assert_close(factors.up.double() @ factors.down.double(), expected, rtol=1e-5, atol=1e-6)
    never = layer.importance.argmin()  # dead from the first deaths on: it is hardly other than it was
    lost = (P[:, never, None] * B[never] - spectrum.P[:, never, None] * spectrum.B[never]).norm()
    assert float(lost) < float((P @ B - spectrum.P @ spectrum.B).norm())
    scores.save(tmp_path / "scores.safetensors")
    again = Scores.load(tmp_path / "scores.safetensors").layers[name].components
    assert all(map(torch.equal, again, (P, B)))


def test_learning_components_goes_on_to_the_same_bits(model, tokens, tmp_path: Path) -> None:
    whole = train_scores(*task(model, tokens, tmp_path / "whole", LEARNING)[0])
    work, _ = task(model, tokens, tmp_path / "parts", LEARNING)

    def stop(event: Event) -> None:
        if event.stage == "train" and event.step == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_scores(work.subject, work.train, work.plan, replace(work.session, notify=stop))
    again = train_scores(*work)
    for name, layer in whole.layers.items():
        assert all(map(torch.equal, layer.components, again.layers[name].components))
        assert torch.equal(layer.importance, again.layers[name].importance)


def test_components_do_not_learn_in_half_precision() -> None:
    train = LEARNING.model_copy(update={"factor_dtype": "bfloat16"})
    with pytest.raises(RecipeError, match="bfloat16"):
        find_scorer("soco").check(train, PlanSettings(keep_params=0.6))
