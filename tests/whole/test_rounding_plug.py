"""A rule of rounding, defined here in one class, goes the whole road: refusal, training, price, export, report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import onnx_ir as ir
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from soco_export.onnx.write.blocks import stored
from soco_export.preflight.checks import check_everything, check_recipe
from soco_export.preflight.cost import estimate, measure
from soco_export.recipe.load import load_recipe
from soco_export.run.verbs import Request, export
from soco_train.errors import ExitCode, RecipeError
from soco_train.numbers.blocks import Grid, Levels, nearest
from soco_train.numbers.rounding import rounded
from soco_train.numbers.rules import _RULES, Rounding, rounding
from soco_train.scores.damage import LossNorm, RoundedInBlocks, damage_to
from soco_train.settings.rounding import RoundingSettings
from soco_train.spectra.decompose import decompose
from soco_train.spectra.statistics import LayerStatistics
from soco_train.store.damage import DENSE
from soco_train.store.scores import LayerScores

SETTINGS = ("export.weights=int4", "export.quantize.rule=down", "gates.max_export_kl=null", "gates.max_ppl_ratio=null")
TRAINED = ("refine.distill.rounding.weights=int4", "refine.distill.rounding.rule=down")
LARGE = 5_000_000_000
FEW = ("bench.enabled=false", "evaluation.blocks=1", "validate.parity.blocks=1", "validate.parity.greedy_prompts=0")


class Down(Rounding):
    """To the next level below."""

    note = "weights were rounded down"

    def check(self, grid: Grid) -> None:
        if grid.bits == 2:
            raise RecipeError("nothing is left of int2 rounded down", fix="export.weights: int4", where="export")

    def rows(self, weight: torch.Tensor, grid: Grid) -> Levels:
        found = nearest(weight, grid)
        return Levels((found.levels - 1).clamp(0), found.scales, found.zeros, found.width)


@pytest.fixture(autouse=True)
def down() -> Iterator[None]:
    rounding("down")(Down)
    yield
    _RULES.pop("down")


def test_layers_are_trained_and_exported_by_it_and_the_report_says_so(
    tiny_run: Path, tmp_path: Path, short: tuple[str, ...]
) -> None:
    run = tmp_path / "run"
    settings = [*short, *SETTINGS, *TRAINED, *FEW, "gates.min_token_agreement=null"]
    outcome = export(Request(out=run, set_=settings), tiny_run)
    assert outcome.code == ExitCode.OK, outcome.text
    weights = load_file(run / "hf" / "model.safetensors")
    graph = ir.load(run / "onnx" / "model.onnx").graph
    written = {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}
    names = [name for name in weights if f"{name}_q4" in written]
    assert {name.rpartition(".up.")[1] for name in names} == {"", ".up."}  # dense weights and both factors of pairs
    grid = Grid(4, 32, symmetric=True)
    for name in names:
        assert (written[f"{name}_q4"] == stored(Down().rows(weights[name].float(), grid), grid).packed).all()
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert Down.note in results["notes"]
    assert Down.note in (run / "report.md").read_text(encoding="utf-8")
    assert results["recipe"]["refine"]["distill"]["rounding"]["rule"] == "down"


def test_what_is_trained_is_what_it_leaves() -> None:
    weight = torch.randn(5, 48)
    settings = RoundingSettings(weights="int4", block=16, rule="down")
    assert torch.equal(rounded(weight, settings), Down().rows(weight, Grid(4, 16, True)).values())


def test_a_plan_for_bytes_pays_what_it_loses() -> None:
    linear, x, gradients = nn.Linear(32, 24, bias=False), torch.randn(99, 32).double(), torch.randn(99, 24).double()
    statistics = LayerStatistics(x.T @ x / 99, None, gradients.T @ gradients / 99, None, 99)
    weight = linear.weight.detach()
    spectrum = decompose(weight, statistics, "plain", 1e-9)
    scores = LayerScores(spectrum.sigma**2, torch.ones(24), None, (24, 32))
    found = damage_to(linear, statistics, spectrum, scores, RoundedInBlocks((16,), rule="down"))
    lost = weight - Down().rows(weight, Grid(4, 16, True)).values()
    expected = LossNorm.of(statistics).error(lost.double())
    assert float(found.curves[DENSE, "int4", 16]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("export.weights=int2", "export.quantize.rule=down"), "nothing is left of int2"),
        (("keep_bytes=2MB", "export.quantize.rule=down"), "nothing is left of int2"),
        (("refine.distill.rounding.weights=int2", "refine.distill.rounding.rule=down"), "nothing is left of int2"),
        (("refine.distill.rounding.weights=int4", "refine.distill.rounding.rule=calibrated"), "asks what each layer"),
        ((*TRAINED, "export.weights=int4"), "rounded by the rule down, and export.quantize.rule is nearest"),
        (("export.weights=int4", "export.quantize.rule=up"), "no rule of rounding is called 'up'"),
        (("refine.distill.rounding.weights=int4", "refine.distill.rounding.rule=up"), "is called 'up'"),
    ],
)
def test_what_it_cannot_do_is_refused_before_anything_is_trained(settings: tuple[str, ...], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        check_recipe(load_recipe("tiny", settings), "onnx")


def test_the_cost_card_asks_one_that_calibrates() -> None:
    @rounding("known")
    class Known(Down):
        calibrates = True

        def layer_bytes(self, m: int, n: int) -> int:
            return LARGE + n

    def export_memory(*settings: str) -> int:
        recipe = load_recipe("tiny", settings)
        shape = measure(recipe)
        return next(phase.host for phase in estimate(recipe, shape).phases if phase.name == "export")

    try:
        plain, more = (
            export_memory("export.weights=int4", f"export.quantize.rule={rule}") for rule in ("down", "known")
        )
        assert more > plain + LARGE
        assert export_memory("export.quantize.rule=known") == plain  # nothing is rounded
    finally:
        _RULES.pop("known")


def test_a_recipe_of_it_passes(tmp_path: Path) -> None:
    check_everything(load_recipe("tiny", [*SETTINGS, *TRAINED]), tmp_path / "run", "onnx")
