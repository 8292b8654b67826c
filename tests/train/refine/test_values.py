"""The rung that narrows values: exact where nothing is lost, apart from the plan, refused where it would be wrong."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from soco_export.checkpoint.layers import apply_factors
from soco_train import method
from soco_train.errors import RecipeError
from soco_train.events import silent
from soco_train.forms.heads import HeadColumns, HeadRows
from soco_train.forms.registry import from_factors
from soco_train.modules.subject import Session
from soco_train.modules.values import ValueSite, check_mixing, value_sites
from soco_train.plan.ranks import plan_ranks
from soco_train.refine.values import narrow_values, value_losses
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings, ValueSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.statistics import collect_statistics
from tests.support.models import logits, small_llama

HALF = ValueSettings(keep=0.5)
PLANNED = ValueSettings(keep="planned")
TWO_SIDED = TrainSettings(scorer="singular-values", basis="two-sided")
UNTRAINED = TrainSettings(scorer="singular-values", basis="plain")


def llama(**changes: Any) -> Any:
    return small_llama(head_dim=16, **changes)


def names_of(site: ValueSite) -> tuple[str, str]:
    return site.value, site.output


def drawn(count: int = 24) -> torch.Tensor:
    return torch.randint(4, 60, (count, 16))


@torch.no_grad()
def limit_values(model: Any, rank: int) -> None:
    """Leave every value head only `rank` independent numbers, in places of its own."""
    for site in value_sites(model):
        weight = model.get_submodule(site.value).weight
        for head in weight.view(site.groups, site.size, -1):
            head.copy_(torch.randn(site.size, rank) @ torch.randn(rank, head.shape[1]) / rank**0.5 / 8)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_nothing_changes_where_the_values_hold_no_more_numbers(groups: int) -> None:
    model, tokens = llama(num_key_value_heads=groups), drawn()
    limit_values(model, 8)
    expected = logits(model, tokens)
    found = narrow_values(model, value_sites(model), tokens, HALF, silent)
    apply_factors(model, found)
    assert {layer.weight.shape for layer in found.values()} == {(8 * groups, 32), (32, 8 * 4)}
    assert float((logits(model, tokens) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_more_numbers_lose_less_and_the_model_is_left_as_it_was() -> None:
    model, tokens = small_llama(head_dim=32), drawn()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected, errors = logits(model, tokens), []
    for keep in (0.25, 0.5, 0.75):
        other = copy.deepcopy(model)
        apply_factors(other, narrow_values(model, value_sites(model), tokens, ValueSettings(keep=keep), silent))
        errors.append(float((logits(other, tokens) - expected).norm()))
    assert errors[0] > errors[1] > errors[2] > 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_projections_take_no_part_in_the_plan_and_distillation_trains_them(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum", HALF)
    apart = {name for site in value_sites(model) for name in (site.value, site.output)}
    assert apart.isdisjoint(subject.linears)
    assert {subject.left_out[f"{name}.weight"].reason for name in apart} == {
        "refine.values: 8 of 16 numbers of each value head stay"
    }
    method.make_spectra(subject, UNTRAINED)
    scores = method.learn_scores(subject, UNTRAINED, PlanSettings(), Session(tmp_path / "scores"))
    plan = plan_ranks(scores, PlanSettings(keep_params=0.6))
    done = {}
    for steps in (0, 3):
        refine = RefineSettings(values=HALF, distill={"steps": steps, "batch_tokens": 64, "lr": 1e-2})
        found = method.cut_factors(subject, scores, plan, refine, Session(tmp_path / f"work{steps}")).made()
        found.save(tmp_path / "factors.safetensors")
        done[steps] = type(found).load(tmp_path / "factors.safetensors").layers
    for name in apart:
        cut, trained = (done[steps][name] for steps in (0, 3))
        assert type(cut) is type(trained) is (HeadRows if "v_proj" in name else HeadColumns)
        assert torch.equal(cut.order, trained.order)
        assert not torch.allclose(cut.weight, trained.weight)
    assert set(plan.layers) <= set(done[3]) | set(plan.dense_layers)


def test_errors_of_fewer_numbers_and_of_fewer_ranks_are_measured_alike(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path, PLANNED)
    method.make_spectra(subject, TWO_SIDED)
    projections = {site.output: model.get_submodule(site.output) for site in subject.narrowable}
    known = collect_statistics(model, projections, tokens, frozenset({"input_covariance", "output_curvature"}))
    for losses in value_losses(subject, None, silent):
        moments, weight = known[losses.output], projections[losses.output].weight.detach().double()
        spectrum = subject.spectra[losses.output]
        cut = (spectrum.P[:, :8].double() @ spectrum.B[:8].double()) - weight
        error = torch.einsum("mn,mi,ij,nj->", moments.output_curvature, cut, moments.input_covariance, cut)
        assert float(error) == pytest.approx(float(spectrum.sigma[8:].double().square().sum()), rel=0.05)
        assert [stay for stay, _ in losses.lost] == [8]
        assert 0 < losses.lost[0][1] < float(spectrum.sigma.double().square().sum())


def test_a_plan_chooses_between_ranks_and_fewer_numbers(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    limit_values(model, 8)  # all that a head says fits in half of its numbers
    expected = logits(model, tokens)
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum", PLANNED)
    method.make_spectra(subject, TWO_SIDED)
    scores = method.learn_scores(subject, TWO_SIDED, PlanSettings(), Session(tmp_path / "scores"))
    projections = sum(subject.linears[name].weight.numel() for site in subject.narrowable for name in names_of(site))
    before = sum(linear.weight.numel() for linear in subject.linears.values())
    keep = (before - projections // 2) / before + 1e-6  # no parameter is lost to rounding
    plan = plan_ranks(scores, PlanSettings(keep_params=keep, allocation="lagrangian"))
    assert plan.values == {site.value: 8 for site in subject.narrowable}
    assert plan.params_after == before - projections // 2
    found = method.cut_factors(subject, scores, plan, RefineSettings(values=PLANNED), Session(tmp_path / "work"))
    assert {name: type(layer) for name, layer in found.layers.items()} == {
        name: kind
        for site in subject.narrowable
        for name, kind in zip(names_of(site), (HeadRows, HeadColumns), strict=True)
    }
    apply_factors(model, found.layers)
    assert float((logits(model, tokens) - expected).abs().max()) < 1e-5 * float(expected.abs().max())


def test_planned_values_are_never_left_out_in_silence(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    for layers in (LayerSettings(exclude=("lm_head", "*.v_proj")), LayerSettings(include=("*.mlp.*",))):
        with pytest.raises(RecipeError, match="both projections of values take part"):
            method.open_subject(model, layers, tokens, tmp_path, PLANNED)
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum")
    method.make_spectra(subject, TWO_SIDED)
    scores = method.learn_scores(subject, TWO_SIDED, PlanSettings(), Session(tmp_path / "scores"))
    plan = plan_ranks(scores, PlanSettings(keep_params=0.6, allocation="lagrangian"))
    with pytest.raises(RecipeError, match="do not say what fewer numbers a value head lose"):
        method.cut_factors(subject, scores, plan, RefineSettings(values=PLANNED), Session(tmp_path / "work"))


def test_a_plan_that_keeps_all_narrows_nothing(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum", PLANNED)
    method.make_spectra(subject, TWO_SIDED)
    scores = method.learn_scores(subject, TWO_SIDED, PlanSettings(), Session(tmp_path / "scores"))
    plan = plan_ranks(scores, PlanSettings(keep_params=1, allocation="lagrangian"))
    assert not plan.values
    refine = RefineSettings(values=PLANNED)
    assert not method.cut_factors(subject, scores, plan, refine, Session(tmp_path / "work")).layers


def test_scores_that_rank_the_projections_are_refused(tmp_path: Path) -> None:
    model, tokens = llama(), drawn()
    subject = method.open_subject(model, LayerSettings(), tokens, tmp_path / "spectrum")
    method.make_spectra(subject, UNTRAINED)
    scores = method.learn_scores(subject, UNTRAINED, PlanSettings(), Session(tmp_path / "scores"))
    plan = plan_ranks(scores, PlanSettings(keep_params=0.3))
    with pytest.raises(RecipeError, match="has a rank already"):
        method.cut_factors(subject, scores, plan, RefineSettings(values=HALF), Session(tmp_path / "work"))


BENDS = {
    "gate": lambda x: x * torch.linspace(0.5, 1.5, x.shape[-1]),
    "bound": lambda x: x.clamp(-0.01, 0.01),
    "order": lambda x: x.roll(16, -1),
}


@pytest.mark.parametrize("bend", BENDS)
def test_attention_that_does_more_to_values_than_mix_them_is_refused(bend: str) -> None:
    model, tokens = llama(), drawn(2)
    check_mixing(model, value_sites(model), tokens)
    between = BENDS[bend]
    model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(lambda _, args: (between(args[0]),))
    with pytest.raises(RecipeError, match="more to values than to mix"):
        check_mixing(model, value_sites(model), tokens)


@pytest.mark.parametrize(
    ("config", "keep", "said"),
    [
        (("gpt2", {"n_embd": 32, "n_head": 2, "n_layer": 1, "vocab_size": 64}), 0.5, "of their own"),
        (("olmo", {"clip_qkv": 4.0, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                   "num_hidden_layers": 1, "vocab_size": 64}), 0.5, "it clips them"),
        (("llama", {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2,
                    "num_hidden_layers": 1, "vocab_size": 64}), 0.9, "give 0.5 or less"),
    ],
)  # fmt: skip
def test_values_that_cannot_be_narrowed_are_refused_by_name(
    config: Any, keep: float, said: str, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config[0], **config[1]))
    with pytest.raises(RecipeError) as refused:
        method.open_subject(model, LayerSettings(), drawn(2), tmp_path, ValueSettings(keep=keep))
    assert said in f"{refused.value.message} {refused.value.fix}"


@pytest.mark.parametrize("kind", [HeadRows, HeadColumns])
def test_a_part_of_heads_is_the_dense_layer_that_it_says(kind: Any) -> None:
    m, n, rank = 7, 9, 4
    shape = (rank, n) if kind is HeadRows else (m, rank)
    factors = kind(torch.randn(shape), torch.randperm(m if kind is HeadRows else n), torch.randn(m))
    assert factors.shape == (m, n)
    module = from_factors(factors)
    x = torch.randn(3, n)
    torch.testing.assert_close(module(x), x @ module.dense_weight().float().T + factors.bias)
    assert (module.dense_weight() != 0).sum() == kind.cost(rank, m, n) == module.weight.numel()
    torch.testing.assert_close(module.to_linear()(x), module(x))
