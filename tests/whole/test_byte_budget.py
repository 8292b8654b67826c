"""A run re-cut to a number of bytes: the files have them, and the checkpoint alone gives the same files again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from soco_export.onnx.build import STAMP
from soco_export.run.another_size import _priced_in
from soco_export.run.folder.allowed import read_lock
from soco_export.run.verbs import Request, export, plan
from soco_train.errors import RecipeError
from soco_train.plan.rank_plan import RankPlan

ASKED = 1_600_000
FILES = ("model.onnx", "model.onnx.data")


@pytest.fixture(scope="module")
def recut(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = shutil.copytree(tiny_run, tmp_path_factory.mktemp("bytes") / "run")
    gates = [f"gates.{name}=null" for name in ("max_ppl_ratio", "max_export_kl", "min_token_agreement")]
    request = Request(keep_bytes=str(ASKED), set_=["bench.enabled=false", *gates])
    outcome = export(Request(**{**vars(request), "out": run.parent / "recut"}), run)
    assert outcome.code == 0, outcome.text
    return run.parent / "recut"


def size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in FILES)


def test_the_file_has_the_bytes_that_were_asked_for(recut: Path) -> None:
    chosen = RankPlan.load(recut / "plan.json").bytes
    assert chosen is not None
    assert 0 <= chosen.written - size(recut / "onnx") <= STAMP
    assert 0.97 * ASKED <= chosen.written <= ASKED
    results = json.loads((recut / "results.json").read_text(encoding="utf-8"))["sizes"]
    assert (results["keep_bytes"], results["file_bytes"]) == (ASKED, size(recut / "onnx"))
    assert len(set(chosen.weights.values())) > 1


def test_the_checkpoint_alone_gives_the_same_files(recut: Path, tmp_path: Path) -> None:
    from soco_export.export import export_onnx
    from soco_export.onnx.settings import ExportSettings

    export_onnx(recut / "hf", tmp_path / "again", ExportSettings())
    first, second = (folder / FILES[1] for folder in (recut / "onnx", tmp_path / "again"))
    assert first.read_bytes() == second.read_bytes()
    assert abs(size(tmp_path / "again") - size(recut / "onnx")) <= STAMP  # who made it from what


def test_other_sizes_are_planned_from_what_was_measured(recut: Path, tmp_path: Path) -> None:
    trained = recut.parent / "run"
    assert not (recut / "damage.safetensors").exists()
    outcome = plan(Request(out=tmp_path), trained, byte_sizes="1.2MB,1.6MB,2.4MB")
    found = [document["bytes"]["written"] for document in outcome.document["plans"]]
    assert found == sorted(found)
    assert all(0.97 * asked <= size <= asked for asked, size in zip((1.2e6, 1.6e6, 2.4e6), found, strict=True))
    with pytest.raises(RecipeError, match="smallest"):
        plan(Request(), trained, byte_sizes="0.1MB")


def test_a_plan_from_what_was_measured_otherwise_is_refused(recut: Path, tmp_path: Path) -> None:
    for setting, said in (
        ("export.quantize.symmetric=false", "other values of export.quantize.symmetric"),
        ('layers.exclude=["*.down_proj"]', "layers.exclude cannot change after training"),
    ):
        with pytest.raises(RecipeError, match=said):
            plan(Request(set_=[setting]), recut.parent / "run", byte_sizes="1.6MB")
    run = shutil.copytree(recut.parent / "run", tmp_path / "run")
    found = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    found["stages"]["damage"]["inputs"]["scores"] = "0" * 64  # as after another training
    (run / "manifest.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(RecipeError, match="other values of the scores"):
        plan(Request(), run, byte_sizes="1.6MB")


def test_the_price_is_measured_once_for_all_sizes(recut: Path) -> None:
    run = recut.parent / "run"
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    assert "damage.safetensors" in manifest["stages"]["damage"]["outputs"]
    recipe = read_lock(run)
    for setting, shared in ({"keep_bytes": 1_200_000}, True), ({"export.quantize.rule": "calibrated"}, False):
        assert bool(_priced_in(run, recipe, recipe.replace({"keep_bytes": ASKED, **setting}))) == shared
