"""The quality benchmark: the grid, the table's arithmetic, and a run of two cells that stops, resumes and skips."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from benchmarks.quality import run as command
from benchmarks.quality.cells import (
    CONTROL,
    CellResult,
    Grid,
    Perplexity,
    is_random,
    read_cells,
    saliency_tokens,
    training_tokens,
)
from benchmarks.quality.laboratory import Laboratory, rotated
from benchmarks.quality.table import markdown, rows
from soco_export.checkpoint.load import load_checkpoint
from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.recipe.load import list_recipes, load_recipe
from soco_train.data.corpus import load_blocks
from soco_train.errors import RecipeError
from soco_train.scores.phases import QUIET_STEPS, Timetable
from soco_train.settings.refine import RefineSettings
from soco_train.settings.train import PhaseSettings

METHODS = [name.removeprefix("methods/") for name in list_recipes(abstract=True) if name.startswith("methods/")]
REFITTED = ("tfwsvd", "two-sided-fisher-refit")  # with gradients, and without training
EVALUATION = load_recipe("tiny", ["evaluation.blocks=2"]).evaluation
SHORT = ("data.blocks=8", "evaluation.blocks=2", "train.statistics_blocks=2", "train.fisher_blocks=2")


def result(method: str, value: float, keep: float = 0.6, seed: int = 0) -> CellResult:
    perplexity = {"evaluation": Perplexity(value, math.log(value), 100)}
    return CellResult(method, "", keep, seed, "", "stacked", 60, 100, 200, 0, 0, perplexity, {}, "code")


DENSE = {"evaluation": Perplexity(10.0, math.log(10.0), 100)}


@given(st.lists(st.floats(10.5, 1e4), min_size=1, max_size=4), st.floats(11, 1e6))
def test_excess_is_relative_to_the_control_at_the_same_size(values: list[float], control: float) -> None:
    cells = [result(CONTROL, control), *(result("soco", value, seed=seed) for seed, value in enumerate(values))]
    found = {row.method: row.texts["evaluation"] for row in rows([*cells, result(CONTROL, 99.0, keep=0.4)], DENSE)[:2]}
    logs = [math.log(value / 10) for value in values]
    assert found["soco"].excess == pytest.approx(sum(logs) / len(logs))
    assert found["soco"].ratio == pytest.approx(sum(logs) / len(logs) / math.log(control / 10))
    assert found["soco"].mean == pytest.approx(sum(values) / len(values))
    assert found["soco"].spread == (pytest.approx(stdev(values)) if len(values) > 1 else None)
    assert found[CONTROL].ratio == pytest.approx(1.0)


def test_without_the_control_there_is_no_ratio() -> None:
    table = rows([result("soco", 20.0)], DENSE)
    assert table[0].texts["evaluation"].ratio is None
    assert "| soco | 0 | 20 |  |" in markdown(table, DENSE)


def test_the_table_has_a_row_per_method_and_a_gap_where_nothing_was_measured() -> None:
    cells = [result(CONTROL, 40.0), result("soco", 20.0), result("soco", 22.0, seed=1), result("soco", 12.0, keep=0.8)]
    lines = markdown(rows(cells, DENSE), DENSE).split("\n")
    assert lines[0] == "### evaluation: dense 10"
    assert lines[2] == "| method | tokens | keep 0.8 | E/E_c | keep 0.6 | E/E_c |"
    assert lines[4] == f"| {CONTROL} | 0 |  |  | 40 | 1.000 |"
    assert lines[5] == "| soco | 0 | 12 |  | 21 ± 1.4 (2) | 0.534 |"


def test_a_grid_goes_seed_by_seed_and_repeats_nothing_that_is_certain() -> None:
    cells = Grid("tiny", ["svd", "fisher"], [0.6, 0.4], [0, 1]).cells()
    first = [(method, keep, 0) for keep in (0.6, 0.4) for method in (CONTROL, "svd", "fisher")]
    assert [(cell.method, cell.keep, cell.seed) for cell in cells] == [*first, ("fisher", 0.6, 1), ("fisher", 0.4, 1)]
    assert all(cell.recipe.train.seed == cell.seed and cell.recipe.keep_params == cell.keep for cell in cells)


def test_effort_multiplies_the_steps_of_all_methods() -> None:
    plain, half = (Grid("tiny", [], [0.6], [0], effort).cell("soco", 0.6, 0).recipe for effort in (1.0, 0.5))
    assert half.train.steps * 2 == plain.train.steps
    assert half.refine.distill.steps * 2 == plain.refine.distill.steps
    assert Grid("tiny", [], [0.6], [0], 0.5).cell("svd", 0.6, 0).recipe.refine.distill.steps == 0


def test_the_key_names_settings_and_inputs_and_nothing_else() -> None:
    cell = Grid("tiny", [], [0.6], [0]).cell("soco", 0.6, 0)
    inputs = {"weights": "a"}
    same = [replace(cell, recipe=cell.recipe.replace({key: 1.5})) for key in ("gates.max_ppl_ratio",)]
    other = [replace(cell, recipe=cell.recipe.replace({key: 0.125})) for key in ("train.lr", "keep_params")]
    assert {found.key(inputs) for found in same} == {cell.key(inputs)}
    assert cell.key(inputs) != cell.key(inputs, whole=True)
    assert len({found.key(inputs) for found in [cell, *other]} | {cell.key({"weights": "b"})}) == 4


@pytest.mark.parametrize("method", METHODS)
def test_every_method_sees_as_many_tokens_as_its_rivals(method: str) -> None:
    recipe = load_recipe("smollm2-135m", overlay=Path("methods") / method)
    whole = training_tokens(load_recipe("smollm2-135m", overlay=Path("methods/soco")))
    weighted = ("fwsvd", "fwsvd-outputs", "sparsity-aware", "asvd")
    certain = ("svd", *weighted, CONTROL, "two-sided", "two-sided-refit", *REFITTED)
    untrained = (*certain, "fisher", "fisher-compensated")
    scores_alone = recipe.train.scorer == "soco" and recipe.refine.distill.steps == 0
    expected = 0 if method in untrained else whole / 2 if scores_alone else whole
    if recipe.train.schedule.stop_early:
        assert training_tokens(recipe) > expected, "it may end early, so it has more to begin with"
    else:
        assert training_tokens(recipe) == expected
    train = recipe.train
    closed_form = train.scorer == "fisher" or (train.scorer == "soco" and train.start == "fisher")
    by_gradient = ("two-sided", "fisher", "fisher-inputs", "sparsity")
    assert (saliency_tokens(recipe, 400) > 0) == (
        closed_form or recipe.train.basis in by_gradient or method in REFITTED
    )
    assert saliency_tokens(recipe, 400) >= saliency_tokens(recipe, 1)
    assert is_random(recipe) == (method not in certain)
    assert recipe.description != load_recipe("smollm2-135m").description


def test_polarisation_is_complete_when_the_support_freezes() -> None:
    train = load_recipe("tiny", overlay=Path("methods/soco")).train
    timetable = Timetable.preset(train)
    last, frozen = (timetable.orders(step, train, 1.0, 0.6) for step in (timetable.freeze - 1, timetable.freeze))
    assert (last.phase, last.frozen, frozen.frozen) == (3, False, True)
    assert last.polarise == pytest.approx(train.polarise_weight)
    assert last.temperature == frozen.temperature == pytest.approx(train.temperature[1])


def test_the_attribution_recipes_switch_what_they_say() -> None:
    def timetable(method: str) -> Timetable:
        return Timetable.preset(load_recipe("tiny", overlay=Path("methods") / method).train)

    assert timetable("soco-rescale-only").freeze == 0
    assert timetable("soco-phase-1").phases == [1]
    assert timetable("soco-phases-1-2").phases == [1, 2]
    assert timetable("soco-phases-1-3").phases == [1, 3]
    assert not load_recipe("tiny", overlay=Path("methods/soco-no-deviation")).train.deviation
    select = load_recipe("tiny", overlay=Path("methods/soco-select-only"))
    assert (select.allocation, select.train.rescale, select.train.select) == ("uniform", False, True)
    kept_shares = load_recipe("tiny", overlay=Path("methods/soco-no-reallocation"))
    assert (kept_shares.allocation, kept_shares.train.rescale, kept_shares.train.select) == ("uniform", True, True)
    reallocate = load_recipe("tiny", overlay=Path("methods/soco-reallocate-only"))
    assert (reallocate.allocation, reallocate.train.rescale, reallocate.train.select) == ("global", False, False)


def test_the_basis_axis_changes_the_basis_alone() -> None:
    whitened = load_recipe("tiny", overlay=Path("methods/soco-scores"))
    bases = {"soco-plain": "plain", "soco-activation": "activation", "soco-fisher-rows": "fisher"}
    for method, basis in {**bases, "soco-two-sided": "two-sided"}.items():
        recipe = load_recipe("tiny", overlay=Path("methods") / method)
        assert recipe == whitened.replace({"train.basis": basis, "description": recipe.description})


def test_the_published_method_is_on_the_plain_svd_from_ones_with_the_default_schedule() -> None:
    recipe = load_recipe("tiny", overlay=Path("methods/soco-published"))
    train = recipe.train
    assert (train.scorer, train.basis, train.start, train.deviation) == ("soco", "plain", "ones", True)
    assert train.schedule == PhaseSettings()
    assert recipe.refine == RefineSettings(distill=recipe.refine.distill)
    assert recipe.refine.distill.steps == 0


def test_the_stopping_rules_have_the_steps_they_need() -> None:
    train = load_recipe("smollm2-135m", overlay=Path("methods/soco-stopping")).train
    preset, stopping = (
        Timetable.preset(load_recipe("smollm2-135m", overlay=Path("methods") / method).train)
        for method in ("soco-scores", "soco-stopping")
    )
    assert train.schedule.stop_early
    assert stopping.begins[1] > 2 * QUIET_STEPS
    assert stopping.steps - stopping.freeze == preset.steps - preset.freeze, "the finish is as long"


def test_every_method_of_the_named_tables_is_shipped() -> None:
    assert {method for methods in command.METHODS.values() for method in methods} <= set(METHODS)


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 4))
def test_a_seed_begins_the_calibration_text_elsewhere_and_loses_nothing(blocks: int, seed: int, by: int) -> None:
    tokens = torch.arange(blocks)[:, None]
    found = rotated(tokens, seed, by)
    assert torch.equal(rotated(tokens, 0, by), tokens)
    assert sorted(found[:, 0].tolist()) == list(range(blocks))
    assert found[0, 0] == seed * by % blocks


def test_a_new_setting_at_its_default_leaves_cells_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = Grid("tiny", [], [0.6], [0]).cell("soco", 0.6, 0)
    before = cell.key({}), cell.key({}, whole=True)
    dumped = type(cell.recipe).model_dump

    def with_one_more(recipe: object, *, exclude_defaults: bool = False, **options: object) -> dict[str, object]:
        values = dumped(recipe, exclude_defaults=exclude_defaults, **options)  # type: ignore[arg-type]
        return values if exclude_defaults else {**values, "train": {**values["train"], "new": 0}}

    monkeypatch.setattr(type(cell.recipe), "model_dump", with_one_more)
    assert cell.key({}) == before[0]
    assert cell.key({}, whole=True) != before[1]


def bench(out: Path, work: Path, *more: str) -> tuple[list[CellResult], list[str]]:
    said: list[str] = []
    settings = [part for setting in SHORT for part in ("--set", setting)]
    arguments = ["--methods", "soco", "--keep", "0.6", "--seeds", "0", "--effort", "0.04", *settings, *more]
    options = command.parse([*arguments, "--out", str(out), "--work", str(work)])
    return command.run(options, said.append), said


def test_a_benchmark_stops_resumes_and_skips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, work = tmp_path / "results", tmp_path / "work"
    whole, measured = Laboratory.measure, []

    def killed(laboratory: Laboratory, cell: object) -> CellResult:
        measured.append(cell)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return whole(laboratory, cell)

    monkeypatch.setattr(Laboratory, "measure", killed)
    with pytest.raises(KeyboardInterrupt):
        bench(out, work)
    assert [cell.method for cell in read_cells(out / "results.json").values()] == [CONTROL]
    assert sorted(path.name for path in out.iterdir()) == ["results.json", "results.md"]

    cells, said = bench(out, work, "--report")
    assert (len(measured), len(cells)) == (2, 1)
    assert said[1].endswith("(missing)")
    assert "**1 of 2 cells are done**" in (out / "results.md").read_text(encoding="utf-8")

    cells, said = bench(out, work)
    assert (len(measured), [cell.method for cell in cells]) == (3, [CONTROL, "soco"])
    assert said[0].endswith("(there)")
    assert all(cell.stored <= 0.6 * cell.of for cell in cells)
    assert all(math.isfinite(cell.perplexity["evaluation"].value) for cell in cells)

    again, said = bench(out, work)
    assert again == cells
    assert len(measured) == 3
    assert all(line.endswith("(there)") for line in said)
    assert "| soco | " in (out / "results.md").read_text(encoding="utf-8")

    # The scores of soco are those of soco-scores, the model is as it was, and another text is another cell.
    text = tmp_path / "more.txt"
    text.write_text("We hold these truths to be self-evident. " * 40, encoding="utf-8")
    more, said = bench(out, work, "--methods", "soco-scores", "--evaluate", f"more={text}:16")
    assert len(list(work.glob("scores-*"))) == 2
    assert more[0].perplexity["evaluation"] == cells[0].perplexity["evaluation"]
    assert set(more[1].perplexity) == {"evaluation", "more"}
    assert not [line for line in said if line.endswith("(there)")]
    kept = read_cells(out / "results.json")
    assert kept == {cell.key: cell for cell in (*more, *cells)}  # those of the earlier command too


def test_the_model_of_a_cell_can_be_kept_and_is_what_was_measured(tmp_path: Path) -> None:
    out, work, models = tmp_path / "results", tmp_path / "work", tmp_path / "models"
    cells, _ = bench(out, work)
    _, said = bench(out, work, "--models", str(models))  # the cells are there, their models are not
    assert not [line for line in said if line.endswith("(there)")]
    names = sorted(f"{cell.method}-{cell.keep:g}-seed{cell.seed}.{cell.key}" for cell in cells)
    assert sorted(path.name for path in models.iterdir()) == names
    folder = models / names[0]
    texts = load_blocks(AutoTokenizer.from_pretrained(folder), EVALUATION, "evaluation")
    found = measure_perplexity(TorchDecoder(load_checkpoint(folder)), texts.tokens)
    assert found.value == pytest.approx(cells[1].perplexity["evaluation"].value, rel=1e-5)
    _, said = bench(out, work, "--models", str(models))
    assert all(line.endswith("(there)") for line in said)


@pytest.mark.parametrize("text", ["wiki", "wiki=a.raw", "wiki=a.raw:x", "=a.raw:8", "wiki=:8"])
def test_a_text_that_cannot_be_read_is_a_usage_error(text: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the text"):
        bench(tmp_path, tmp_path, "--evaluate", text)
