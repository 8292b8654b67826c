"""Mixtures opened: the same map and numbers, statistics of each expert's own tokens, and what is hardly visited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from soco_train import api
from soco_train.modules.experts import OpenExperts, close_experts, is_stack
from soco_train.modules.layers import select_linears
from soco_train.modules.sites import open_sites, opened
from soco_train.settings.data import LayerSettings
from soco_train.settings.train import TrainSettings
from soco_train.spectra.statistics import collect_statistics
from tests.support import decoders
from tests.support.zoo import ZOO

pytestmark = pytest.mark.transformers
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "phimoe", "gpt_oss")


def mixture(name: str) -> Any:
    decoders.CONFIGS.setdefault(name, ZOO[name])
    return decoders.tiny_model(name)


def stacked(name: str) -> Any:
    """A mixture whose experts this transformers holds in stacks."""
    model = mixture(name)
    if not any(is_stack(module) for module in model.modules()):
        pytest.skip("this transformers has the experts apart")
    return model


def experts_of(linears: Any) -> list[str]:
    return [name for name in linears if ".experts." in name]


@torch.no_grad()
@pytest.mark.parametrize("name", MIXTURES)
def test_an_open_mixture_is_the_same_map_with_the_same_numbers(name: str) -> None:
    model = stacked(name)
    tokens = torch.randint(3, 90, (2, 20))
    expected, stacks = model(tokens).logits, {id(module): module for module in model.modules() if is_stack(module)}
    count = sum(parameter.numel() for parameter in model.parameters())
    with opened(model):
        torch.testing.assert_close(model(tokens).logits, expected, atol=2e-5, rtol=1e-4)
        linears = select_linears(model, LayerSettings())
        assert len(experts_of(linears)) == sum(3 * len(stack.down_proj) for stack in stacks.values())
        assert sum(parameter.numel() for parameter in model.parameters()) == count
        linears[experts_of(linears)[0]].weight[0, 0] += 7  # a view: the stack has it too
        changed = model(tokens).logits
    assert {id(module) for module in model.modules() if is_stack(module)} == set(stacks)
    torch.testing.assert_close(model(tokens).logits, changed, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_mixture_closes_to_what_it_was(name: str) -> None:
    model = stacked(name)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    open_sites(model)
    assert any(isinstance(module, OpenExperts) for module in model.modules())
    assert close_experts(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[key], before[key]) for key in before)


@torch.no_grad()
def test_statistics_of_an_expert_are_those_of_the_tokens_that_chose_it() -> None:
    model = stacked("qwen3_moe")
    tokens = torch.randint(3, 90, (6, 24))
    routed: list[tuple[torch.Tensor, torch.Tensor]] = []
    block = model.model.layers[1].mlp
    handle = block.experts.register_forward_pre_hook(lambda _, args: routed.append((args[0], args[1])))
    model(tokens)
    handle.remove()
    hidden, chosen = (torch.cat(parts) for parts in zip(*routed, strict=True))
    open_sites(model)
    names = [f"model.layers.1.mlp.experts.{number}.{part}_proj" for number in range(4) for part in ("gate", "up")]
    linears = {name: model.get_submodule(name) for name in names}
    found = collect_statistics(model, linears, tokens, frozenset({"input_covariance", "input_magnitude"}))
    for number in range(4):
        x = hidden[(chosen == number).any(-1)].double()
        statistics = found[f"model.layers.1.mlp.experts.{number}.gate_proj"]
        assert statistics.tokens == len(x)
        torch.testing.assert_close(statistics.input_covariance, x.T @ x / tokens.numel(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(statistics.input_magnitude, x.abs().sum(0) / tokens.numel(), rtol=1e-4, atol=1e-6)
        assert found[f"model.layers.1.mlp.experts.{number}.up_proj"].input_covariance is statistics.input_covariance


@pytest.mark.parametrize("basis", ["whitened", "two-sided"])
def test_an_expert_that_the_text_hardly_visits_stays_dense_and_the_scores_say_so(basis: str, tmp_path: Path) -> None:
    """Eight experts share 144 tokens, two a token: some see fewer than their 32 components, some see more."""
    decoders.CONFIGS["many"] = ("qwen3_moe", {**ZOO["qwen3_moe"][1], "num_experts": 8})
    model, tokens = decoders.tiny_model("many"), torch.randint(3, 90, (6, 24))
    visits = [0] * 8

    def count(number: int, x: torch.Tensor) -> None:
        visits[number] += len(x)

    with opened(model), torch.no_grad():
        experts = [model.get_submodule(f"model.layers.1.mlp.experts.{number}.gate_proj") for number in range(8)]
        handles = [
            linear.register_forward_hook(lambda _, args, __, number=number: count(number, args[0]))
            for number, linear in enumerate(experts)
        ]
        model(tokens)
        for handle in handles:
            handle.remove()
    assert sum(visits) == 2 * tokens.numel()
    few = {number for number, visited in enumerate(visits) if visited < 32}
    scores = api.learn_scores(model, tokens, tmp_path, TrainSettings(scorer="singular-values", basis=basis))
    dense = {name: rest for name, rest in scores.provenance["left_out"].items() if ".experts." in name}
    parts = ("gate_proj", "up_proj", "down_proj")
    assert set(dense) == {f"model.layers.1.mlp.experts.{number}.{part}.weight" for number in few for part in parts}
    assert all("hardly visits" in reason for _, reason in dense.values())
    assert len(experts_of(scores.layers)) == 3 * (8 - len(few))


def test_a_basis_that_reads_no_text_leaves_no_expert_out(tmp_path: Path) -> None:
    model, tokens = mixture("qwen3_moe"), torch.randint(3, 90, (1, 4))
    scores = api.learn_scores(model, tokens, tmp_path, TrainSettings(scorer="singular-values", basis="plain"))
    assert len(experts_of(scores.layers)) == 3 * 4
    assert not experts_of(scores.provenance["left_out"])
