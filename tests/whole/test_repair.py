"""A run that lost its manifest or its lock gets it back where its other files agree, and in no other case."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from soco_export.recipe.load import load_recipe
from soco_export.run.folder.manifest import Manifest
from soco_export.run.verbs import Request, repair, report
from soco_train.errors import RecipeError
from tests.support.cli import contents, soco

LOCK, MANIFEST = "recipe.lock.yaml", "manifest.json"


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def outputs(root: Path) -> dict[str, dict[str, str]]:
    """Return the hash of each file of each stage, and the key under which it was done."""
    found = Manifest.load(root)
    assert found is not None
    return {
        name: {"": stage.key, **{path: file.sha256 for path, file in stage.outputs.items()}}
        for name, stage in found.stages.items()
    }


def test_a_lost_manifest_is_the_one_that_was_there(run: Path, tiny_run: Path) -> None:
    (run / MANIFEST).unlink()
    before = contents(run)
    ran = soco("repair", run, "--json", plots=True)  # the report that is there has them
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["left_out"] == {}
    assert outputs(run) == outputs(tiny_run)
    old, new = Manifest.load(tiny_run), Manifest.load(run)
    assert old is not None
    assert new is not None
    assert new.written.keys() == old.written.keys()
    assert (new.argv[1:], new.seed, new.inputs.keys()) == (old.argv[1:], old.seed, old.inputs.keys())
    assert {name: data for name, data in contents(run).items() if name != MANIFEST} == before


def test_results_from_before_a_key_are_those_of_its_default(run: Path) -> None:
    told = json.loads((run / "results.json").read_text())
    del told["recipe"]["refine"]["values"]["each"]
    (run / "results.json").write_text(json.dumps(told, indent=2) + "\n")
    (run / MANIFEST).unlink()
    left = json.loads(soco("repair", run, "--json", plots=True).out)["left_out"]
    assert "another recipe" not in str(left)


def test_after_it_nothing_is_made_again(run: Path) -> None:
    (run / MANIFEST).unlink()
    repair(Request(), run)
    again = soco("export", run)
    assert again.code == 0, again.err
    assert "running" not in again.err
    assert again.err.count("up to date") > 8


def changed_tensor(path: Path) -> None:
    tensors = load_file(path)
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    with torch.no_grad():
        tensors[name].view(-1)[0] += 1
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)


def edited_json(path: Path) -> None:
    path.write_text(path.read_text().replace('"mean_kl": ', '"mean_kl": 1', 1))


EDITS = {
    "plan.json": ("plan", lambda path: path.write_text(path.read_text().replace('"rank": 1', '"rank": 2', 1))),
    "factors.safetensors": ("factors", changed_tensor),
    "hf/config.json": ("checkpoint", lambda path: path.write_text(path.read_text() + " ")),
    "evidence/proof.json": ("proof", edited_json),
    "report.md": ("report", lambda path: path.write_text("my own words")),
}


@pytest.mark.parametrize("edited", EDITS)
def test_what_was_changed_is_left_out_with_all_that_was_made_of_it(run: Path, edited: str) -> None:
    stage, edit = EDITS[edited]
    (run / MANIFEST).unlink()
    edit(run / edited)
    before = contents(run)
    found = repair(Request(), run).document
    assert stage in found["left_out"], found
    assert "report" in found["left_out"]
    manifest = Manifest.load(run)
    assert manifest is not None
    assert stage not in manifest.stages
    assert edited not in manifest.written or stage == "plan"
    assert {name: data for name, data in contents(run).items() if name != MANIFEST} == before
    with pytest.raises(RecipeError, match="what would be lost"):  # the file is the user's: nothing is written over it
        manifest.check_own(run, [edited])


@pytest.mark.parametrize("name", ["hf/more.json", "onnx/config.json"])
def test_a_link_is_left_out_and_not_followed(run: Path, tmp_path: Path, name: str) -> None:
    (run / MANIFEST).unlink()
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(tmp_path / "nowhere")
    assert "is a link" in repair(Request(), run).document["left_out"]["checkpoint" if "hf" in name else "onnx"]
    assert (run / name).is_symlink()


def test_a_changed_spectrum_is_left_out_alone(run: Path) -> None:
    (run / MANIFEST).unlink()
    changed_tensor(next((run / "spectrum").glob("*.safetensors")))
    assert set(repair(Request(), run).document["left_out"]) == {"spectrum"}


def test_changed_scores_leave_nothing_to_repair(run: Path) -> None:
    (run / MANIFEST).unlink()
    changed_tensor(run / "scores.safetensors")
    with pytest.raises(RecipeError, match=r"not what results\.json was measured on"):
        repair(Request(), run)
    assert not (run / MANIFEST).exists()


def test_another_model_s_scores_are_no_run_s(run: Path) -> None:
    (run / MANIFEST).unlink()
    (run / LOCK).write_text((run / LOCK).read_text().replace("  seed: 0", "  seed: 9", 1))
    with pytest.raises(RecipeError, match="another train"):
        repair(Request(), run)
    assert not (run / MANIFEST).exists()


def test_a_lost_lock_is_the_recipe_that_was_there(run: Path, tiny_run: Path) -> None:
    (run / LOCK).unlink()
    found = repair(Request(), run).document
    assert found["written"] == LOCK
    assert load_recipe(run / LOCK) == load_recipe(tiny_run / LOCK)
    assert report(Request(), run).code == 0


def test_without_results_the_flags_must_give_the_manifest_s_keys(run: Path, tiny_run: Path) -> None:
    (run / LOCK).unlink()
    (run / "results.json").unlink()
    with pytest.raises(RecipeError, match=r"has no results\.json") as raised:
        repair(Request(), run)
    assert "--model" in (raised.value.fix or "")
    with pytest.raises(RecipeError, match="not the recipe of the run"):
        repair(Request(model="tiny"), run)
    assert not (run / LOCK).exists()
    repair(Request(recipe=tiny_run / LOCK), run)
    assert load_recipe(run / LOCK) == load_recipe(tiny_run / LOCK)


def test_another_program_s_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text('{"name": "app"}')
    before = contents(tmp_path)
    with pytest.raises(RecipeError, match="not a manifest"):
        repair(Request(), tmp_path)
    assert contents(tmp_path) == before


def test_what_is_whole_or_no_run_is_said_to_be(run: Path, tmp_path: Path) -> None:
    before = contents(run)
    assert repair(Request(), run).document["written"] is None
    assert contents(run) == before
    (tmp_path / "empty").mkdir()
    ran = soco("repair", tmp_path / "empty")
    assert ran.code == 2
    assert "no run" in ran.err
