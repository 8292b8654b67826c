"""The plug-ins in docs/extending.md are real: each snippet is executed, found by its name, and used."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from soco_export.onnx.describe.config import resolve_config
from soco_export.onnx.families import FAMILIES, describe, exaone
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_export.runtimes import registry as runtimes
from soco_train.errors import RecipeError
from soco_train.modules.subject import Session, Subject
from soco_train.numbers import rules
from soco_train.numbers.blocks import Grid, nearest
from soco_train.plan.ranks import plan_ranks
from soco_train.refine import refit
from soco_train.refine.ladder import refine
from soco_train.refine.rungs import RUNGS
from soco_train.scores import closed_form
from soco_train.scores.registry import SCORERS, train_scores
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.section import Section
from soco_train.settings.train import TrainSettings
from soco_train.spectra import bases
from soco_train.spectra.decompose import decompose
from soco_train.spectra.statistics import LayerStatistics

PAGE = Path(__file__).parents[2] / "docs" / "extending.md"
ONNX_PAGE = PAGE.with_name("onnx.md")
REGISTRIES = (bases._BASES, SCORERS, RUNGS, RefineSettings.of_steps, rules._RULES, runtimes.RUNTIMES, FAMILIES)


@pytest.fixture(autouse=True)
def _restore_registries() -> Iterator[None]:
    before = [dict(registry) for registry in REGISTRIES]
    yield
    for registry, kept in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(kept)


def snippet(start: str) -> str:
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def define(start: str, module: object, **more: object) -> None:
    exec(compile(snippet(start), str(PAGE), "exec"), {**vars(module), **more})


def test_the_rung_is_climbed(tmp_path: Path) -> None:
    define("class Shrink", refit, Section=Section, replace=replace)
    linear = nn.Linear(5, 7)
    spectra = {"layer": decompose(linear.weight, LayerStatistics(), "plain", ridge=0.0)}
    subject = Subject(linear, {"layer": linear}, spectra, torch.zeros(1, 8, dtype=torch.int64))
    train = TrainSettings(scorer="singular-values")
    scores = train_scores(subject, train, PlanSettings(), Session(tmp_path))
    plan = plan_ranks(scores, PlanSettings(keep_params=0.7))
    before, after = (
        refine(subject, scores, plan, RefineSettings.model_validate(given), Session(tmp_path), {}).layers["layer"]
        for given in ({}, {"shrink": {"by": 0.25}})
    )
    torch.testing.assert_close(after.up, before.up * 0.75)


def test_the_basis_decomposes_exactly() -> None:
    define("@basis", bases)
    weight = torch.randn(7, 5)
    statistics = LayerStatistics(input_magnitude=torch.rand(5, dtype=torch.float64) + 0.1)
    found = decompose(weight, statistics, "magnitude", ridge=0.0)
    torch.testing.assert_close(found.P @ found.B, weight, rtol=1e-5, atol=1e-5)


def test_the_scorer_scores(tmp_path: Path) -> None:
    define("@scorer", closed_form)
    linear = nn.Linear(5, 7)
    spectra = {"layer": decompose(linear.weight, LayerStatistics(), "plain", ridge=0.0)}
    subject = Subject(linear, {"layer": linear}, spectra, torch.zeros(1, 8, dtype=torch.int64))
    train = TrainSettings(scorer="energy-per-parameter")
    importance = train_scores(subject, train, PlanSettings(), Session(tmp_path)).layers["layer"].importance
    torch.testing.assert_close(importance, torch.linalg.svdvals(linear.weight.detach()) ** 2 / 12)


def test_the_rule_rounds_and_refuses() -> None:
    define("@rounding", rules, replace=replace)
    weight, grid = torch.randn(3, 40), Grid(4, 16, symmetric=True)
    rule = rules.find_rounding("down")
    plain = nearest(weight, grid)
    assert torch.equal(rule.rows(weight, grid).levels, (plain.levels - 1).clamp(0))
    with pytest.raises(RecipeError, match="int2"):
        rule.check(replace(grid, bits=2))


def test_the_runtime_refuses_and_writes(tmp_path: Path) -> None:
    define("@runtime", runtimes)
    settings = ExportSettings(layouts=("labels",))
    with pytest.raises(RecipeError, match="one sequence"):
        runtimes.check_runtimes(settings, None)
    settings = settings.model_copy(update={"last_token_logits": True})
    runtimes.check_runtimes(settings, None)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}), encoding="utf-8")
    fields = dict.fromkeys(inspect.signature(runtimes.Layout).parameters)
    runtimes.write_layouts(runtimes.Layout(**{**fields, "source": tmp_path, "folder": tmp_path, "settings": settings}))
    assert (tmp_path / "vocab.txt").read_text(encoding="utf-8") == "a\nb"


def test_the_recipe_is_read(tmp_path: Path) -> None:
    file = tmp_path / "my-model.yaml"
    file.write_text(snippet("extends: base"), encoding="utf-8")
    recipe = load_recipe(file)
    assert (recipe.name, recipe.model.id) == ("my-model", "owner/name")


def test_every_room_that_is_named_exists() -> None:
    for page in [*PAGE.parent.glob("*.md"), PAGE.parents[1] / "CONTRIBUTING.md", PAGE.parents[1] / "README.md"]:
        for name in re.findall(r"`((?:soco_train|soco_export|tools|recipes|tests)/[\w./-]+)`", page.read_text("utf-8")):
            if "my-model" not in name:
                assert (PAGE.parents[1] / name).exists(), f"{page.name}: {name}"


def test_the_family_is_described_from_its_parts(tmp_path: Path) -> None:
    define("@family", exaone)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 2}))
    config = resolve_config(tmp_path)
    found = describe(replace(config, values={**config.values, "model_type": "milli", "depth_factor": 0.25}))
    assert found is not None
    assert found.residual.scale == 0.25
    assert "model.layers.1.post_feedforward_layernorm.weight" in found.norms()


def test_the_table_of_families_is_the_registry() -> None:
    rows = re.findall(
        r"^\| \[(\w+)\.py\]\(\.\./soco_export/onnx/families/\1\.py\) \| (.*) \|$", ONNX_PAGE.read_text(), re.M
    )
    written = {(room, model_type) for room, types in rows for model_type in re.findall(r"`(\w+)`", types)}
    assert written == {(found.__module__.rpartition(".")[2], name) for name, (found, _) in FAMILIES.items()}
