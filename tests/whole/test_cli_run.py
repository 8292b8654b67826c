"""Whole runs on the built-in model: every verb on them, resuming, being killed, failing a gate."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from pathlib import Path
from xml.etree import ElementTree

import pytest

from soco_export.run.folder.allowed import read_lock
from soco_export.run.folder.held import open_folder
from tests.support.cli import Ran, contents, python, soco

SETTINGS = ("--model", "tiny", "--set", "gates.max_ppl_ratio=null")


@pytest.fixture
def quick(short: tuple[str, ...]) -> list[str]:
    """Return the flags of a run of the built-in model that takes seconds."""
    return [*SETTINGS, *(part for setting in short for part in ("--set", setting))]


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    """Return a copy of a finished run, times of change included."""
    return shutil.copytree(tiny_run, tmp_path / "tiny")


def stages(ran: Ran) -> dict[str, str]:
    """Return what each stage's last line on stderr says."""
    lines = (line.split(maxsplit=1) for line in ran.err.splitlines() if line.strip())
    return {line[0]: line[1] for line in lines if len(line) == 2}


@pytest.mark.transformers
class TestFinishedRun:
    def test_holds_everything_and_nothing_unfinished(self, tiny_run: Path) -> None:
        names = {path.name for path in tiny_run.iterdir()}
        assert names >= {
            *("manifest.json", "recipe.lock.yaml", "scores.safetensors", "plan.json", "factors.safetensors"),
            *("hf", "onnx", "results.json", "report.md", "report.html", "junit.xml"),
        }
        assert list((tiny_run / "unfinished").iterdir()) == []
        assert not [path for path in tiny_run.rglob("*") if "partial" in path.name]

    def test_manifest_hashes_every_file(self, tiny_run: Path) -> None:
        manifest = json.loads((tiny_run / "manifest.json").read_text())
        recorded = {
            name: file["sha256"] for stage in manifest["stages"].values() for name, file in stage["outputs"].items()
        }
        own = {"manifest.json", "recipe.lock.yaml", "run.held"}
        found = {name: hashlib.sha256(data).hexdigest() for name, data in contents(tiny_run).items() if name not in own}
        assert recorded == found
        assert {stage["status"] for stage in manifest["stages"].values()} == {"done"}
        assert {Path(name).name for name in manifest["inputs"]} == {"config.json", "model.safetensors"}

    def test_card_and_results_count_the_same(self, tiny_run: Path) -> None:
        card, results = (json.loads((tiny_run / name).read_text()) for name in ("evidence/card.json", "results.json"))
        assert card["params_before"] == results["sizes"]["params_before"] == 2_755_008
        assert card["params_after"] == results["sizes"]["params_after"]

    def test_goes_on_without_doing_anything(self, run: Path, quick: list[str]) -> None:
        before = contents(run)
        ran = soco("train-and-export", *quick, "--out", run)
        assert ran.code == 0, ran.err
        assert {text for name, text in stages(ran).items() if name != "spectrum"} == {"up to date"}
        changed = {name for name, data in contents(run).items() if before.get(name) != data}
        assert changed == {"manifest.json"}  # who ran last

    def test_says_the_result(self, run: Path, quick: list[str]) -> None:
        out = soco("train-and-export", *quick, "--out", run).out
        assert "layers left dense · stored stacked" in out
        assert "perplexity: dense" in out
        assert "ok     max_export_kl" in out
        assert "decode_32" in out
        assert str(run / "report.md") in out

    def test_says_the_same_as_json(self, run: Path, quick: list[str]) -> None:
        document = json.loads(soco("train-and-export", *quick, "--out", run, "--json").out)
        assert document["schema_version"] == 1
        assert document["run"] == str(run)
        assert all(verdict["passed"] for verdict in document["verdicts"])

    def test_a_deleted_file_is_made_again_and_a_changed_one_refused(self, run: Path, quick: list[str]) -> None:
        whole = (run / "onnx" / "model.onnx").read_bytes()
        (run / "onnx" / "model.onnx").write_bytes(whole[:100])
        ran = soco("train-and-export", *quick, "--out", run)
        assert ran.code == 2
        assert "onnx/model.onnx (changed since it was written)" in ran.err
        (run / "onnx" / "model.onnx").unlink()
        ran = soco("train-and-export", *quick, "--out", run)
        assert ran.code == 0, ran.err
        assert "onnx/model.onnx is gone" in ran.err
        assert stages(ran)["scores"] == "up to date"
        assert stages(ran)["proof"] == "up to date"  # the file is what it was
        assert (run / "onnx" / "model.onnx").read_bytes() == whole

    def test_another_recipe_is_refused(self, run: Path, quick: list[str]) -> None:
        before = contents(run)
        ran = soco("train-and-export", *quick, "--out", run, "--set", "train.lr=0.5")
        assert ran.code == 2
        assert "holds another run: train.lr differs" in ran.err
        assert "--fresh" in ran.err
        assert contents(run) == before

    def test_the_lock_file_is_the_recipe(self, run: Path) -> None:
        shown = soco("recipes", "show", run / "recipe.lock.yaml").out
        assert shown in (run / "recipe.lock.yaml").read_text()


class TestGates:
    def test_a_failed_gate_is_code_3_and_names_figure_and_threshold(self, run: Path, quick: list[str]) -> None:
        ran = soco("train-and-export", *quick, "--out", run, "--set", "gates.max_ppl_ratio=0.5")
        assert ran.code == 3
        said = " ".join(ran.out.split())  # however it is folded
        assert "FAILED max_ppl_ratio: perplexity beside the dense model:" in said
        assert "at most 0.5" in said
        assert stages(ran)["proof"] == "up to date"
        suite = ElementTree.fromstring((run / "junit.xml").read_text())
        assert suite.get("failures") == "1"

    def test_judging_again_costs_nothing(self, run: Path) -> None:
        judged = soco("report", run, "--set", "gates.max_ppl_ratio=0.5")
        assert (judged.code, "gates.max_ppl_ratio: changed for good" in judged.err) == (3, True)
        assert soco("report", run, "--set", "gates.max_ppl_ratio=null").code == 0
        lock = (run / "recipe.lock.yaml").read_text(encoding="utf-8")
        refused = soco("report", run, "--set", "evaluation.block=16")
        assert refused.code == 2
        assert "evaluation.block" in refused.err
        assert (run / "recipe.lock.yaml").read_text(encoding="utf-8") == lock

    def test_a_report_tells_what_was_measured_and_not_what_is_to_be(self, run: Path) -> None:
        before = json.loads((run / "results.json").read_text())["recipe"]
        with open_folder(run, read_lock(run).override(["evaluation.blocks=3"])):
            pass  # killed before it measured
        assert soco("report", run).code == 0
        assert json.loads((run / "results.json").read_text())["recipe"] == before
        assert "blocks: 3\n" not in (run / "hf/README.md").read_text()

    def test_gates_on_onnx_are_not_judged_without_onnx(self, run: Path) -> None:
        ran = soco("export", run, "--format", "hf", "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["verdicts"] == []
        assert "not judged" in json.loads(ran.out)["notes"][0]


class TestPlan:
    def test_one_size_layer_by_layer(self, tiny_run: Path) -> None:
        out = soco("plan", tiny_run).out
        assert "model.layers.5.mlp.down_proj" in out
        assert "layers left dense" in out

    def test_several_sizes(self, tiny_run: Path, tmp_path: Path) -> None:
        ran = soco("plan", tiny_run, "--keep-params", "0.9,0.6", "--out", tmp_path / "plans", "--json")
        plans = json.loads(ran.out)["plans"]
        assert [plan["keep_params"] for plan in plans] == [0.9, 0.6]
        assert all(plan["params_after"] <= plan["keep_params"] * plan["params_before"] for plan in plans)
        assert {path.name for path in (tmp_path / "plans").iterdir()} == {"plan-0.9.json", "plan-0.6.json"}

    @pytest.mark.parametrize(
        "key", ["train.steps=9", "refine.values.keep=0.5", "layers.exclude=[lm_head]", "data.block=64"]
    )
    def test_what_the_scores_depend_on_cannot_be_asked_for(self, tiny_run: Path, key: str) -> None:
        ran = soco("plan", tiny_run, "--set", key)
        assert ran.code == 2
        assert "cannot change after training" in ran.err

    def test_nothing_is_written_through_a_link(self, tiny_run: Path, tmp_path: Path) -> None:
        (tmp_path / "theirs").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "theirs")
        ran = soco("plan", tiny_run, "--keep-params", "0.9", "--out", tmp_path / "link")
        assert ran.code == 2
        assert "is a link" in ran.err
        assert not list((tmp_path / "theirs").iterdir())

    @pytest.mark.parametrize("sizes", ["0.9,1.2", "0", "half"])
    def test_a_size_that_is_none(self, tiny_run: Path, sizes: str) -> None:
        ran = soco("plan", tiny_run, "--keep-params", sizes)
        assert ran.code == 2
        assert "(0, 1]" in ran.err

    def test_of_several_sizes_the_impossible_one_is_named(self, tiny_run: Path) -> None:
        ran = soco("plan", tiny_run, "--keep-params", "1,0.0001")
        assert ran.code == 2
        assert "keep_params 0.0001 leaves less than the smallest rank" in ran.err


@pytest.mark.transformers
class TestExport:
    def test_another_size_without_training_again(self, run: Path) -> None:
        before = contents(run)
        ran = soco("export", run, "--keep-params", "0.75", "--format", "hf", "--json")
        assert ran.code == 0, ran.err
        assert stages(ran)["scores"] == "up to date"
        small = json.loads((run / "keep-0.75" / "plan.json").read_text())
        assert small["params_after"] <= 0.75 * small["params_before"]
        assert not (run / "keep-0.75" / "scores.safetensors").exists()
        assert {name for name in before if contents(run).get(name) != before[name]} == {"manifest.json"}
        again = soco("validate", run / "keep-0.75", "--json")
        assert again.code == 0, again.err
        assert stages(again)["scores"] == "up to date"
        for other in (["--format", "dense"], ["--keep-params", "0.9", "--format", "hf"]):  # of that size, and from it
            ran = soco("export", run / "keep-0.75", *other, "--json")
            assert ran.code == 0, ran.err
            assert stages(ran)["scores"] == "up to date"
        assert not [*(run / "keep-0.75").rglob("scores.safetensors")]

    def test_what_the_scores_depend_on_is_refused(self, run: Path) -> None:
        ran = soco("export", run, "--set", "train.steps=9", "--out", run.parent / "other")
        assert ran.code == 2
        assert "train.steps cannot change after training" in ran.err

    def test_other_settings_need_a_folder(self, run: Path) -> None:
        ran = soco("export", run, "--set", "export.flavour=contrib")
        assert ran.code == 2
        assert "--out" in ran.err

    def test_dense_loads_anywhere_and_is_proven(self, run: Path) -> None:
        results = (run / "results.json").read_text()
        ran = soco("export", run, "--format", "dense", "--json")
        assert ran.code == 0, ran.err
        assert "quantization_config" not in json.loads((run / "dense" / "config.json").read_text())
        parity, before = (json.loads(text)["parity"] for text in (ran.out, results))
        assert parity["export"]["prefill"]["token_agreement"] == 1.0
        for part in ("prefill", "decode"):  # the dense model's own answers, which the merged one's are not
            assert parity["compression"][part] == pytest.approx(before["compression"][part])

    def test_a_hugging_face_folder(self, tiny_run: Path, tmp_path: Path) -> None:
        few = ("--set", "evaluation.blocks=1", "--set", "evaluation.block=64", "--set", "validate.threads=1")
        ran = soco("export", tiny_run / "hf", "--out", tmp_path / "onnx", *few, "--json")
        assert ran.code == 0, ran.err
        assert (tmp_path / "onnx" / "model.onnx").is_file()
        assert json.loads(ran.out)["parity"]["export"]["prefill"]["mean_kl"] < 1e-8
        again = soco("export", tiny_run / "hf", "--out", tmp_path / "onnx", *few)
        assert again.code == 2
        assert soco("export", tiny_run / "hf", "--out", tmp_path / "onnx", *few, "--fresh").code == 0

    def test_no_model_at_all(self, tmp_path: Path) -> None:
        ran = soco("export", tmp_path)
        assert ran.code == 2
        assert "is no run" in ran.err


class TestFolders:
    @pytest.mark.transformers
    def test_validate_one_against_another(self, tiny_run: Path) -> None:
        few = ("--set", "evaluation.blocks=1", "--set", "evaluation.block=64", "--set", "validate.threads=1")
        ran = soco("validate", tiny_run / "onnx", "--against", tiny_run / "hf", *few)
        assert ran.code == 0, ran.err
        assert "ok     max_export_kl" in ran.out
        wrong = soco("validate", tiny_run / "onnx-dense", "--against", tiny_run / "hf", *few)
        assert wrong.code == 3
        assert "FAILED max_export_kl" in wrong.out
        beside = soco("validate", tiny_run / "onnx", "--against", tiny_run / "onnx-dense", *few)  # as a CI job has them
        assert beside.code == 0, beside.err
        assert "compression" in beside.out
        assert "max_ppl_ratio" in beside.out

    def test_bench_two_folders(self, tiny_run: Path) -> None:
        few = [
            word
            for key in ("rounds=2", "seconds=0", "cold_starts=1", "prefill=[16]", "past=16")
            for word in ("--set", f"bench.{key}")
        ]
        ran = soco("bench", tiny_run / "onnx", "--against", tiny_run / "onnx-dense", *few, "--json")
        assert ran.code == 0, ran.err
        assert set(json.loads(ran.out)["latency"]["workloads"]) == {"prefill_16", "decode_16"}
        assert soco("bench", tiny_run / "hf", "--against", tiny_run / "onnx-dense").code == 2

    def test_bench_a_run_measures_again(self, run: Path) -> None:
        ran = soco("bench", run)
        assert ran.code == 0, ran.err
        assert stages(ran)["bench"].startswith("done")
        assert stages(ran)["proof"] == "up to date"

    def test_compare(self, tiny_run: Path, run: Path) -> None:
        soco("report", run, "--set", "gates.max_ppl_ratio=0.5")
        ran = soco("compare", tiny_run / "results.json", run, "--json")
        assert ran.code == 0, ran.err
        assert json.loads(ran.out)["settings"] == {"gates.max_ppl_ratio": [None, 0.5]}

    def test_compare_with_what_is_no_result(self, tiny_run: Path) -> None:
        assert soco("compare", tiny_run, tiny_run / "plan.json").code == 2


SMALL = (
    *("--model", "smollm2-135m", "--tiny", "--set", "data.blocks=4", "--set", "train.statistics_blocks=2"),
    *("--set", "train.start=ones", "--set", "train.steps=8", "--set", "train.checkpoint_every=1"),
)
RUN = Path("runs", "smollm2-135m-tiny")


# The command line of a process that sends itself a signal when its third checkpoint is about to be put in its place.
ENDS = """
import os, pathlib, sys
number, checkpoints = int(sys.argv.pop(1)), []
def watch(event, arguments):
    if event == "os.rename" and pathlib.Path(arguments[1]).match("unfinished/scores.*/work/*.safetensors"):
        checkpoints.append(arguments)
        if len(checkpoints) == 3:
            os.kill(os.getpid(), number)
sys.addaudithook(watch)
from soco_export.__main__ import main
main()
"""


def end_at_a_checkpoint(folder: Path, number: signal.Signals) -> tuple[int, str]:
    """Train in `folder` until the third checkpoint, whose training gets the signal; return exit code and stderr."""
    done = python("-c", ENDS, int(number), "train", *SMALL, folder=folder)
    assert not (folder / RUN / "scores.safetensors").exists()
    return done.returncode, done.stderr


def test_a_killed_training_goes_on_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code, _ = end_at_a_checkpoint(tmp_path, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert json.loads((RUN / "manifest.json").read_text())["stages"]["scores"]["status"] == "running"
    for verb in (["export", RUN, "--keep-params", "0.5"], ["export", RUN], ["validate", RUN], ["sweep", RUN]):
        early = soco(*verb)
        assert early.code == 2
        assert "has no scores yet" in early.err
        assert "train --model" in early.err
    resumed = soco("train", *SMALL)
    assert resumed.code == 0, resumed.err
    assert "running: was interrupted" in resumed.err
    assert stages(resumed)["spectrum"] == "up to date"
    first = next(line for line in resumed.err.splitlines() if line.startswith("scores") and "  train  " in line)
    assert int(first.split()[2].split("/")[0]) > 1
    straight = soco("train", *SMALL, "--out", "straight")
    assert straight.code == 0, straight.err
    for name in ("scores.safetensors", "evidence/scores.jsonl"):
        assert (RUN / name).read_bytes() == Path("straight", name).read_bytes()


def test_an_interrupt_says_that_the_run_can_go_on(tmp_path: Path) -> None:
    code, err = end_at_a_checkpoint(tmp_path, signal.SIGINT)
    assert code == 130
    assert "Traceback" not in err
    assert "goes on from the last checkpoint" in err


@pytest.mark.parametrize(
    ("flags", "resumes"), [(["--fresh"], True), (["--dry-run"], False), (["--dry-run", "--fresh"], False)]
)
def test_an_interrupt_of_a_dry_run_speaks_of_no_checkpoint(
    flags: list[str], resumes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("soco_export.run.verbs.train_and_export", interrupted)
    ran = soco("train-and-export", "--model", "tiny", *flags)
    assert ran.code == 130
    assert ("without --fresh goes on from the last checkpoint" in ran.err) == resumes
    assert ("the same command starts again" in ran.err) != resumes


def test_a_run_in_use_is_left_alone(tiny_run: Path, run: Path, quick: list[str]) -> None:
    from filelock import FileLock

    with FileLock(run / "run.held"):
        ran = soco("train-and-export", *quick, "--out", run)
    assert ran.code == 2
    assert "in use by another process" in ran.err


@pytest.mark.transformers
def test_the_tiny_variant_of_a_large_model(tmp_path: Path, short: tuple[str, ...]) -> None:
    flags = [part for setting in short for part in ("--set", setting)]
    ran = soco("train-and-export", "--model", "mistral-7b", "--tiny", *flags, "--out", tmp_path / "run", "--json")
    assert ran.code == 0, ran.err
    results = json.loads(ran.out)
    assert results["model"]["architecture"] == "MistralForCausalLM"
    assert results["model"]["source"] == "random"


def test_looking_again_keeps_the_command_that_made_the_run(run: Path) -> None:
    made = json.loads((run / "manifest.json").read_text())
    made["argv"] = ["soco-export", "train-and-export", "--model", "tiny"]
    (run / "manifest.json").write_text(json.dumps(made))
    assert soco("report", run).code == 0
    assert json.loads((run / "manifest.json").read_text())["argv"] == made["argv"]
    assert "soco-export train-and-export --model tiny" in (run / "report.md").read_text()
