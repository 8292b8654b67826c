"""A sweep of a finished run: points as ordinary runs that share what they can, one frontier, one choice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from soco_export.run.request import parse_byte_sizes, parse_sizes
from soco_train.errors import RecipeError
from tests.support.cli import contents, soco

# of 32 decoded tokens two others are already more than the gate of int8 lets pass
QUICK = ("--set", "bench.enabled=false", "--set", "gates.min_token_agreement=null")
SWEEP = ("--keep-params", "0.8", "--weights", "same,int8", *QUICK)


@pytest.fixture(scope="module")
def swept(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of a finished run at 0.6 that was swept at 0.8 in two types."""
    run = Path(shutil.copytree(tiny_run, tmp_path_factory.mktemp("swept") / "tiny"))
    ran = soco("sweep", run, *SWEEP, plots=True)
    assert ran.code == 0, ran.err
    return run


def test_what_is_shared_is_made_once(swept: Path, tiny_run: Path) -> None:
    scores = (tiny_run / "scores.safetensors").read_bytes()
    assert (swept / "scores.safetensors").read_bytes() == scores
    for name, once in (("scores.safetensors", 1), ("factors.safetensors", 2), ("model.safetensors", 2)):
        assert len(list(swept.rglob(name))) == once, name  # factors and checkpoints: of 0.6 and of 0.8
    dense = {path.parent.name for path in swept.rglob("onnx-dense")}
    assert dense == {"tiny", "dense-int8"}
    assert {path.name for path in (swept / "keep-0.8-int8").iterdir()} >= {"onnx", "results.json", "report.html"}


def test_the_frontier_says_what_the_runs_say(swept: Path) -> None:
    manifest = json.loads((swept / "manifest.json").read_text())
    assert list(manifest["stages"]["frontier"]["outputs"]) == ["evidence/frontier.json"]
    found = {point["name"]: point for point in json.loads((swept / "evidence/frontier.json").read_text())["points"]}
    assert list(found) == ["dense", "0.8", "dense int8", "0.8 int8"]
    for name in ("0.8", "0.8 int8"):
        results = json.loads((swept / found[name]["folder"] / "results.json").read_text())
        assert found[name]["perplexity_ratio"] == results["perplexity"]["ratio"]
        assert found[name]["bytes"] == results["sizes"]["bytes"]["onnx"]
    assert "Sizes from one training" in (swept / "report.md").read_text()
    assert "Size against quality" in (swept / "report.html").read_text()


def test_the_same_sweep_does_nothing_again(swept: Path) -> None:
    before = contents(swept)
    ran = soco("sweep", swept, *SWEEP)
    assert ran.code == 0, ran.err
    assert " running" not in ran.err
    changed = {name for name, data in contents(swept).items() if before.get(name) != data}
    assert {Path(name).name for name in changed} <= {"manifest.json", "report.html", "report.md"}


def test_what_measures_the_points_leaves_the_run_as_it_was_measured(swept: Path, tiny_run: Path) -> None:
    assert (swept / "recipe.lock.yaml").read_text() == (tiny_run / "recipe.lock.yaml").read_text()
    told, measured = (json.loads((run / "results.json").read_text())["recipe"] for run in (swept, tiny_run))
    assert told == measured  # bench.enabled too: it was timed
    assert not json.loads((swept / "keep-0.8/results.json").read_text())["recipe"]["bench"]["enabled"]


@pytest.mark.parametrize(
    ("way", "said"),
    [
        ("dense-int8/mine.txt", "holds files that are no run"),
        ("keep-0.8/mine.txt", "holds files that are no run"),  # where the int8 point has its plan
        ("evidence/frontier.json", "not written by soco-export"),
        ("evidence/proof.json", "changed since it was written"),  # the run's report could not be written in the end
    ],
)
def test_what_is_in_the_way_is_said_first(tiny_run: Path, tmp_path: Path, way: str, said: str) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    (run / way).parent.mkdir(exist_ok=True)
    (run / way).write_text("mine")
    before = contents(run)
    ran = soco("sweep", run, "--keep-params", "0.6,0.8", "--weights", "int8", *QUICK)
    assert ran.code == 2
    assert said in ran.err
    assert "move" in ran.err
    assert "--out" not in ran.err  # which a sweep has not
    assert "--fresh" not in ran.err
    assert contents(run) == before


def test_an_edited_file_of_the_last_point_is_said_first(swept: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(swept, tmp_path / "tiny"))
    with (run / "keep-0.8-int8/evidence/proof.json").open("a") as file:
        file.write(" ")
    before = contents(run)
    ran = soco("sweep", run, *SWEEP)
    assert ran.code == 2
    assert "evidence/proof.json (changed since it was written)" in ran.err
    assert contents(run) == before


@pytest.mark.parametrize("edited", [True, False])
def test_a_lock_of_the_last_point_is_looked_at_first(swept: Path, tmp_path: Path, edited: bool) -> None:
    run = Path(shutil.copytree(swept, tmp_path / "tiny"))
    lock = run / "keep-0.8-int8/recipe.lock.yaml"
    text = lock.read_text()
    lock.unlink()
    if edited:
        lock.write_text(text + "seed: 3\n")
    before = contents(run)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("soco_export.preflight.checks.check_everything", lambda *given: pytest.fail("too late"))
        ran = soco("sweep", run, *SWEEP)
    assert ran.code == 2
    assert f"soco-export repair {run / 'keep-0.8-int8'}" in ran.err.replace("\n", " ")
    assert contents(run) == before


@pytest.mark.parametrize("point", ["keep-0.8", "keep-0.8-int8"])
def test_a_point_is_reported_like_a_run(point: str, swept: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(swept, tmp_path / "tiny")) / point
    before = (run / "results.json").read_text()
    ran = soco("report", run)
    assert ran.code == 0, ran.err
    assert (run / "results.json").read_text() == before
    assert not (run / "hf").exists() or point == "keep-0.8"
    alone = run.rename(tmp_path / "alone")
    assert soco("report", alone).code == (0 if point == "keep-0.8" else 2)


def test_a_point_is_planned_from_the_scores_of_its_run(swept: Path, tmp_path: Path) -> None:
    own = json.loads(soco("plan", swept, "--keep-params", "0.8", "--json").out)["plans"]
    for point in ("keep-0.8", "keep-0.8-int8"):
        assert json.loads(soco("plan", swept / point, "--json").out)["plans"] == own
    ran = soco("plan", swept / "dense-int8")
    assert ran.code == 2
    assert "give the run that was swept" in ran.err
    alone = Path(shutil.copytree(swept / "keep-0.8", tmp_path / "alone"))
    ran = soco("plan", alone)
    assert ran.code == 2
    assert "move it back into its run" in ran.err


def test_a_cut_is_not_trained_to_be_swept(swept: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(swept, tmp_path / "tiny")) / "keep-0.8"
    before = contents(run)
    ran = soco("sweep", run, "--keep-params", "0.8", *QUICK)
    assert ran.code == 2
    assert f"soco-export sweep {run.parent} --keep-params 0.8" in ran.err.replace("\n    ", " ")
    assert contents(run) == before


def test_what_is_missing_of_the_run_is_made_anew_and_what_is_not_read_may_be_edited(
    tiny_run: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "tiny"))
    (run / "evidence/proof.json").unlink()
    assert soco("sweep", run, "--keep-params", "0.6", *QUICK).code == 0
    assert (run / "evidence/proof.json").is_file()
    with (run / "onnx/config.json").open("a") as file:
        file.write(" ")
    ran = soco("sweep", run, "--keep-params", "0.8", *QUICK)
    assert ran.code == 0, ran.err
    assert (run / "onnx/config.json").read_text().endswith(" ")


def test_one_size_in_several_spellings_is_one() -> None:
    assert parse_sizes("0.6,0.60,6e-1, .8", 1.0) == [0.6, 0.8]
    assert parse_byte_sizes("9MB,9000kB,9000000", None) == [9_000_000]
    with pytest.raises(RecipeError, match=r"two sizes go by the name 0\.8"):
        parse_sizes("0.8000001,0.9,0.8000002", 1.0)


def test_one_is_chosen_and_the_others_have_a_reason(swept: Path) -> None:
    best = json.loads(soco("choose", swept, "--max-ppl-ratio", "1.9", "--prefer", "bytes", "--json").out)
    assert best["chosen"]["name"] == "0.8 int8"
    assert Path(best["folder"]) == swept / "keep-0.8-int8"
    none = soco("choose", swept, "--max-bytes", "1kB", "--json")
    assert none.code == 3
    assert json.loads(none.out)["nearest"]["weights"] == "int8"
    assert len(json.loads(none.out)["rejected"]) == 4


def test_what_means_nothing_is_refused(tiny_run: Path) -> None:
    for flags, said in (
        (("--weights", "int3"), "no type of weights"),
        (("--keep-params", "2"), "(0, 1]"),
        (("--set", "train.steps=9"), "train.steps cannot change in a sweep"),
    ):
        ran = soco("sweep", tiny_run, *flags)
        assert ran.code == 2
        assert said in ran.err
    ran = soco("choose", tiny_run)
    assert ran.code == 2
    assert "soco-export sweep" in ran.err
