"""A scorer that trains and a rung, each defined here in one function with its settings, go the whole road."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import nn

from soco_export.preflight.cost import estimate, measure
from soco_export.preflight.cost_shape import BASE_DEVICE
from soco_export.recipe.load import load_recipe
from soco_export.run import on_run
from soco_export.run.verbs import Request, train, train_and_export
from soco_train import method
from soco_train.cost import Cost, ModelShape, Task
from soco_train.errors import ExitCode, RecipeError
from soco_train.events import Event
from soco_train.forms.stacked import StackedFactors
from soco_train.learn.divergence import divergence
from soco_train.learn.loop import Loop
from soco_train.modules.scored import ScoreBank, scored_model
from soco_train.modules.subject import Session, Subject
from soco_train.plan.rank_plan import RankPlan
from soco_train.refine.cut import cut_layers
from soco_train.refine.rungs import RUNGS, rung
from soco_train.scores.closed_form import untrained
from soco_train.scores.registry import READ_BY_ALL, SCORERS, scorer
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.section import Section
from soco_train.settings.train import TrainSettings
from soco_train.store.factors import Factors
from soco_train.store.scores import Scores
from soco_train.store.spectra import SpectrumStore
from tests.support.models import make_model

SCORING, LOUDER = 123_000_000, 7_000_000  # bytes, as the toys say


class Pulled(Section):
    """How hard the toy's scores are pulled down."""

    pull: float = 0.5


class Pulling(Loop):
    """Scores learnt by the KL to the dense model and a pull to 0."""

    kind: ClassVar[str] = "pulling"
    stage: ClassVar[str] = "train"
    rate: ClassVar[str] = "train.lr"

    def __init__(self, subject: Subject, train: TrainSettings, session: Session, bank: ScoreBank) -> None:
        self.model, self.train, self.bank = subject.model, train, bank
        optimiser = torch.optim.SGD(bank.parameters(), lr=train.lr)
        super().__init__(session, train, subject.tokens, dict(bank.named_parameters()), [optimiser])
        self.resume()

    @property
    def steps(self) -> int:
        return self.train.steps

    def one_step(self) -> None:
        tokens, weight = self.own_part()
        with self.bank.teacher():
            teacher = self.model(input_ids=tokens, use_cache=False).logits
        self.bank.install()
        kl, _ = divergence(self.model(input_ids=tokens, use_cache=False).logits, teacher, tokens)
        loss = kl + self.train.of_step("pulled").pull * self.bank.scores().mean()
        self.report({"loss": self.backward(loss, loss, weight)})
        self.update()
        self.step += 1

    def state(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Mapping[str, torch.Tensor], header: Mapping[str, Any]) -> None:
        pass


class Louder(Section):
    """The factor by which `up` grows and `down` shrinks; 0: off."""

    by: float = Field(default=0, ge=0)


def refuse_strong(train: TrainSettings, plan: PlanSettings) -> None:
    if train.of_step("pulled").pull > 1:
        raise RecipeError("pulled too hard", fix="train.pulled.pull: 1, or less", where="recipe: train.pulled.pull")


def scoring_cost(task: Task, shape: ModelShape, width: int) -> Cost:
    return Cost(SCORING, flops={"float32": 6.0 * task.train.steps * task.train.batch_tokens * shape.parameters})


@pytest.fixture(autouse=True)
def steps() -> Iterator[None]:
    reads = ["steps", "batch_tokens", "lr", "clip", "checkpoint_every"]

    @scorer("pulled", reads=reads, trains=True, section=Pulled, check=refuse_strong, cost=scoring_cost)
    def pulled(subject: Subject, train: TrainSettings, plan: PlanSettings, session: Session) -> Scores:
        with scored_model(subject.model, subject.linears, subject.spectra, torch.float32) as layers:
            training = Pulling(subject, train, session, ScoreBank(layers, "relu", deviation=False))
            training.run()
            return untrained(subject, train, training.bank.per_layer(training.bank.scores().detach()))

    @rung("louder", on="factors", switch="by", section=Louder, cost=lambda task, shape, width: Cost(LOUDER))
    def louder(
        subject: Subject, factors: Mapping[str, StackedFactors], settings: Louder, session: Session
    ) -> dict[str, StackedFactors]:
        return {
            name: StackedFactors(layer.up * settings.by, layer.down / settings.by, layer.bias)
            for name, layer in factors.items()
        }

    yield
    SCORERS.pop("pulled")
    RUNGS.pop("louder")
    TrainSettings.of_steps.pop("pulled")
    RefineSettings.of_steps.pop("louder")


OURS = ("train.scorer=pulled", "train.pulled.pull=0.25", "refine.louder.by=4", "refine.distill.steps=0")


def test_the_whole_road(short: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    less = ("bench.enabled=false", "data.blocks=8", "evaluation.blocks=2", "validate.parity.greedy_prompts=0")
    settings = [*short, *OURS, *less, "gates.max_ppl_ratio=null"]
    told: list[str] = []
    outcome = train_and_export(Request(model="tiny", out=run, set_=settings), lambda event: told.append(event.stage))
    assert outcome.code == ExitCode.OK, outcome.text
    assert "train" in told  # the shared loop told of its steps
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["recipe"]["train"]["pulled"] == {"pull": 0.25}
    assert results["parity"]["export"]["prefill"]["mean_kl"] < 1e-6
    scores = Scores.load(run / "scores.safetensors")
    assert scores.provenance["scorer"] == "pulled"
    assert any(layer.importance.unique().numel() > 1 for layer in scores.layers.values())
    again: list[str] = []
    train(Request(model="tiny", out=run, set_=settings), lambda event: again.append(event.stage))
    assert "train" not in again  # finished stages stay finished
    plan, loud = RankPlan.load(run / "plan.json"), Factors.load(run / "factors.safetensors").layers
    linears = {name: nn.Linear(*reversed(layer.shape), bias=False) for name, layer in plan.layers.items()}
    for name, layer in cut_layers(SpectrumStore(run / "spectrum"), scores, plan, linears).items():
        torch.testing.assert_close(loud[name].up, layer.up * 4)
        torch.testing.assert_close(loud[name].down, layer.down / 4)


def test_the_cost_card_adds_up_what_they_say() -> None:
    recipe = load_recipe("tiny", OURS)
    shape = measure(recipe)
    with_them, without = (
        {phase.name: phase for phase in estimate(found, shape).phases}
        for found in (recipe, load_recipe("tiny", [*OURS, "refine.louder.by=0"]))
    )
    assert with_them["factors"].device - without["factors"].device == LOUDER
    silent = {phase.name: phase for phase in estimate(load_recipe("tiny", ["train.scorer=fisher"]), shape).phases}
    assert with_them["scores"].device == BASE_DEVICE + SCORING != silent["scores"].device
    assert with_them["scores"].gpu_hours > 0
    assert estimate(recipe, shape).training_tokens == recipe.train.steps * recipe.train.batch_tokens


def test_what_they_refuse_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pulled too hard"):
        train(Request(model="tiny", out=tmp_path / "run", set_=["train.scorer=pulled", "train.pulled.pull=2"]))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.pulled.pul=2", "did you mean train.pulled.pull"),
        ("train.puled.pull=2", "did you mean train.pulled"),
        ("refine.louder.by=-1", "refine.louder.by"),
        ("train.pulled=3", "train.pulled"),
    ],
)
def test_a_wrong_key_of_theirs_is_named(setting: str, said: str) -> None:
    with pytest.raises(RecipeError) as refused:
        load_recipe("tiny", [setting])
    assert said in f"{refused.value.message} {refused.value.fix}"
    assert "--set" in refused.value.where


def test_a_step_that_is_not_asked_for_leaves_no_trace() -> None:
    assert "pulled" not in TrainSettings().model_dump()
    assert "louder" not in RefineSettings().model_dump()


class Spy(TrainSettings):
    """Settings that know which of their keys were asked for."""

    def __getattribute__(self, name: str) -> Any:
        if name in TrainSettings.model_fields:
            ASKED.add(name)
        return super().__getattribute__(name)


ASKED: set[str] = set()
WITHOUT_TRAINING = ("fisher", "singular-values")


@pytest.mark.parametrize("name", [*WITHOUT_TRAINING, "acip"])
def test_a_scorer_reads_what_it_says(name: str, tmp_path: Path) -> None:
    model, tokens = make_model("llama-tied"), torch.randint(4, 250, (4, 16))
    train = Spy(scorer=name, basis="plain", steps=2, batch_tokens=32)
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum")
    method.make_spectra(subject, train)
    ASKED.clear()
    SCORERS[name].run(subject, train, PlanSettings(), Session(tmp_path / "work"))
    assert SCORERS[name].reads == ASKED - READ_BY_ALL


def test_a_setting_that_the_scorer_does_not_read_is_noted() -> None:
    asked = ["train.scorer=acip", "train.warmup=0.2", "train.schedule.freeze=0.2", "train.lr=0.5"]
    card = train(Request(model="tiny", dry_run=True, set_=asked))
    assert card.document["notes"] == ["the scorer acip does not read train.warmup, train.schedule.freeze"]
    assert card.document["notes"][0] in card.text
    read = train(Request(model="tiny", dry_run=True, set_=["train.warmup=0.2"]))
    assert "notes" not in read.document


def test_it_is_noted_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Event] = []
    monkeypatch.setattr(on_run, "advance", lambda *_, **__: None)
    train(Request(model="tiny", out=tmp_path / "run", set_=["train.scorer=fisher", "train.lr=0.5"]), told.append)
    assert [event.values[""] for event in told] == ["the scorer fisher does not read train.lr"]
