"""The model card is a pure function of what it is told."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import yaml
from torch import nn

from soco_export.checkpoint.card import CardSummary, format_cell, render_card, summarise_layers
from soco_export.checkpoint.layers import apply_factors, count_parameters
from soco_export.files.text import visible
from soco_export.recipe.load import load_recipe
from soco_export.run.stages.model_card import model_card, summary_json
from soco_train.forms.pivoted import PivotedFactors
from soco_train.forms.stacked import StackedFactors
from soco_train.store.factors import Factors

RECIPE = "model:\n  name: tiny  # with ``` in a comment\nkeep_params: 0.8\n"
RESULTS = {"dense": {"perplexity": 19.13412, "decode ms": 22}, "low rank | 0.8": {"perplexity": None, "MiB": 12345.6}}


@pytest.fixture
def summary() -> CardSummary:
    model = nn.ModuleDict({"a": nn.ModuleDict({"fc1": nn.Linear(6, 8), "fc2": nn.Linear(8, 6)}), "b": nn.Linear(6, 8)})
    before = count_parameters(model)
    down, up = torch.randn(2, 6), torch.randn(8, 2)
    pivoted = PivotedFactors(torch.randn(3, 8), torch.randn(3, 3), torch.randperm(6), torch.randn(6))
    apply_factors(model, Factors({"a.fc1": StackedFactors(up, down, torch.randn(8)), "a.fc2": pivoted}))
    summary = summarise_layers(model, "org/model-1", {"seed": "0"})
    assert (summary.params_before, summary.params_after) == (before, count_parameters(model))
    return summary


def test_groups_name_roles_ranks_and_sizes(summary: CardSummary) -> None:
    rows = [(g.role, g.count, g.kind, g.low, g.high, g.params_before, g.params_after) for g in summary.groups]
    assert rows == [("fc1", 1, "stacked", 2, 2, 48, 28), ("fc2", 1, "pivoted", 3, 3, 48, 33)]


def test_the_card_holds_recipe_results_and_hint(summary: CardSummary) -> None:
    card = render_card(RECIPE, RESULTS, summary)
    assert f"````yaml\n{RECIPE}````\n" in card
    assert "pip install soco-export" in card
    assert "| dense | 19.13 | 22 | n/a |\n| low rank \\| 0.8 | n/a | n/a | 12,346 |" in card
    assert "| fc1 | 1 | stacked | 2 | 48 → 28 |\n| fc2 |" in card
    assert "- seed: 0" in card
    assert card.endswith("\n")
    assert not card.endswith("\n\n")
    assert "\n\n\n" not in card


def test_the_header_is_yaml_and_names_only_hub_ids(summary: CardSummary) -> None:
    for base, expected in (("org/model-1", "org/model-1"), ("/home/me/secret/model", None), ("tiny", None)):
        card = render_card(RECIPE, None, dataclasses.replace(summary, base_model=base))
        assert yaml.safe_load(card.split("---")[1]).get("base_model") == expected
        assert "/home/me" not in card
        assert "Measured" not in card


def test_what_is_said_of_its_origin_is_no_markup(summary: CardSummary) -> None:
    card = render_card("", None, dataclasses.replace(summary, provenance={"text": "a\n# b\x1b[2J<script>"}))
    assert visible(card) == card
    assert "\n# b" not in card
    assert "<script>" not in card.replace("\\<script\\>", "")


def test_a_dense_card_asks_for_nothing_to_be_installed(summary: CardSummary) -> None:
    card = render_card("", None, dataclasses.replace(summary, dense=True))
    assert "pip install soco-export" not in card
    assert "Recipe" not in card


def test_the_biases_of_a_run_are_no_part_of_what_was_before() -> None:
    model = nn.ModuleDict({"fc": nn.Linear(60, 80, bias=False)})
    before = count_parameters(model)
    apply_factors(model, Factors({"fc": StackedFactors(torch.randn(80, 20), torch.randn(20, 60), torch.randn(80))}))
    recipe = load_recipe("tiny")
    card = model_card(recipe.as_values(), summary_json(recipe, model, before))
    assert "4,800" in card
    assert "2,880" in card
    assert "4,880" not in card


def test_an_unpruned_model_says_so() -> None:
    assert "Every layer is dense." in render_card("", None, summarise_layers(nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.000123456, "0.0001235"), (1.5, "1.5"), (1234567, "1,234,567"), (20061.4, "20,061"), (None, "n/a"), ("a", "a")],
)
def test_cells(value: float | str | None, shown: str) -> None:
    assert format_cell(value) == shown
