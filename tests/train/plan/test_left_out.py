"""Nothing is left out in silence: every weight of the blocks takes part, or the plan says why it does not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from soco_train.modules.layers import select_linears
from soco_train.modules.participation import left_out
from soco_train.plan.left_out import LeftOut, notes, taking_part
from soco_train.plan.rank_plan import RankPlan
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.data import LayerSettings
from soco_train.settings.plan import PlanSettings
from soco_train.store.scores import LayerScores, Scores


class _Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down_proj = nn.Parameter(torch.empty(4, 8, 6))


def block() -> nn.Module:
    shared = nn.Linear(8, 8)
    parts: dict[str, Any] = {
        "up": nn.Linear(8, 8),
        "gate": nn.Linear(8, 4),
        "first": shared,
        "second": nn.Linear(8, 8),
        "experts": _Experts(),
        "norm": nn.LayerNorm(8),
        "table": nn.Embedding(3, 8),
    }
    parts["second"].weight = shared.weight
    return nn.ModuleDict(parts)


def model() -> nn.Module:
    whole: dict[str, Any] = {"embed": nn.Embedding(9, 8), "layers": nn.ModuleList([block()])}
    return nn.ModuleDict({"model": nn.ModuleDict(whole), "other": nn.ModuleList([nn.Linear(8, 8)])})


def test_each_weight_takes_part_or_has_its_reason() -> None:
    whole = model()
    linears = select_linears(whole, LayerSettings())
    found = left_out(whole, linears, LayerSettings())
    reasons = {name.removeprefix("model.layers.0."): weight.reason for name, weight in found.items()}
    assert list(linears) == ["model.layers.0.up"]
    assert reasons == {
        "gate.weight": "layers.exclude has *.gate",
        "first.weight": "its weight is shared with another module",
        "experts.down_proj": "_Experts holds its matrices in one tensor, which is not compressed",
        "table.weight": "Embedding is no Linear",
        "other.0.weight": "no glob of layers.include matches",
    }


def random_scores(rest: dict[str, LeftOut]) -> Scores:
    layer = LayerScores(torch.rand(8), torch.rand(8), None, (8, 8))
    listed = {name: [weight.shape, weight.reason] for name, weight in rest.items()}
    return Scores({"model.layers.0.up": layer}, {"left_out": listed} if listed else {})


def test_a_plan_lists_what_takes_no_part_and_the_share_that_does() -> None:
    rest = {f"model.layers.{index}.experts.down_proj": LeftOut((4, 8, 6), "in one tensor") for index in range(2)} | {
        "model.layers.0.gate.weight": LeftOut((4, 8), "layers.exclude has *.gate")
    }
    plan = plan_ranks(random_scores(rest), PlanSettings(keep_params=0.5))
    assert RankPlan.from_json(plan.to_json()) == plan
    assert plan.left_out == rest
    share = 64 / (64 + 2 * math.prod((4, 8, 6)) + 32)
    assert taking_part(plan.params_before, plan.left_out) == pytest.approx(share)
    assert f"{share:.1%} of the blocks' weights take part" in plan.describe(1000)
    first, experts, gate = notes(plan.params_before, plan.left_out, 0.5)
    assert "less than half" in first
    assert f"removes {share / 2:.1%}" in first
    assert "model.layers.*.experts.down_proj (2 tensors" in experts
    assert "layers.exclude has *.gate" in gate


def test_a_plan_in_which_all_take_part_is_as_it_was() -> None:
    plan = plan_ranks(random_scores({}), PlanSettings(keep_params=0.5))
    assert "left_out" not in plan.to_json()
    assert list(notes(plan.params_before, plan.left_out, 0.5)) == []
