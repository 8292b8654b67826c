"""Stages run when something they depend on changed, and never otherwise; a killed stage goes on where it was."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from soco_export.recipe.difference import differences
from soco_export.recipe.recipe import Recipe
from soco_export.run.folder.allowed import CONTENT, check_folder
from soco_export.run.folder.held import RunFolder, open_folder
from soco_export.run.folder.manifest import Manifest
from soco_export.run.folder.names import HELD, LOCK, MANIFEST, UNFINISHED
from soco_export.run.pipeline import Pipeline, Stage
from soco_train.errors import MachineError, RecipeError
from soco_train.events import Event

Log = list[str]


def a_recipe(**changes: object) -> Recipe:
    source = {"builtin": "speeches"}
    return Recipe.model_validate({"name": "tiny", "model": {}, "data": source, "evaluation": source, **changes})


def writer(name: str, *files: str) -> Callable[[Log, Path], None]:
    def work(log: Log, out: Path) -> None:
        log.append(name)
        for file in files:
            (out / file).parent.mkdir(parents=True, exist_ok=True)
            (out / file).write_text(f"{name} wrote {file}")

    return work


PATIENCE = 300  # seconds that a process may take to start: it imports torch
SPECTRUM = Stage[Log](
    "spectrum", ("model",), ("train.basis",), ("spectrum",), writer("spectrum", "spectrum/a"), cache=True
)
SCORES = Stage[Log]("scores", ("spectrum",), ("train",), ("scores",), writer("scores", "scores"))
PLAN = Stage[Log]("plan", ("scores",), ("keep_params",), ("plan.json",), writer("plan", "plan.json"))
CARD = Stage[Log]("card", ("plan",), ("gates",), ("hf/README.md",), writer("card", "hf/README.md"))
HF = Stage[Log]("hf", ("plan",), (), ("hf",), writer("hf", "hf/config.json", "hf/README.md"))
STAGES = (SPECTRUM, SCORES, PLAN, HF, CARD)


def run(root: Path, recipe: Recipe, stages: tuple[Stage[Log], ...] = STAGES, model: str = "weights") -> Log:
    log: Log = []
    with open_folder(root, recipe) as folder:
        Pipeline(folder, stages, log, {"model": lambda: model}).run()
    return log


class TestPipeline:
    def test_everything_once(self, tmp_path: Path) -> None:
        assert run(tmp_path / "run", a_recipe()) == ["spectrum", "scores", "plan", "hf", "card"]
        assert run(tmp_path / "run", a_recipe()) == []

    def test_the_manifest_tells_it_all(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        manifest = Manifest.load(tmp_path)
        assert manifest is not None
        assert {name: record.status for name, record in manifest.stages.items()} == {s.name: "done" for s in STAGES}
        assert set(manifest.stages["hf"].outputs) == {"hf/config.json"}
        assert set(manifest.stages["card"].outputs) == {"hf/README.md"}
        assert manifest.process.pid > 0
        assert "python" in manifest.versions

    def test_a_changed_setting_repeats_only_what_depends_on_it(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        assert run(tmp_path, a_recipe(gates={"max_ppl_ratio": 9.0})) == ["card"]

    def test_a_new_setting_at_its_default_leaves_a_run_done(self, tmp_path: Path, monkeypatch) -> None:
        dump = Recipe.model_dump

        def with_more(recipe: Recipe, **options: Any) -> dict[str, Any]:
            values = dump(recipe, **options)
            if not options.get("exclude_defaults"):
                values["train"]["invented_later"] = 1
            return values

        run(tmp_path, a_recipe())
        monkeypatch.setattr(Recipe, "model_dump", with_more)
        assert run(tmp_path, a_recipe()) == []

    def test_a_run_with_the_keys_of_before_is_done(self, tmp_path: Path, monkeypatch) -> None:
        key = Pipeline._key
        monkeypatch.setattr(Pipeline, "_key", lambda self, stage, whole=False: key(self, stage, whole=True))
        run(tmp_path, a_recipe())
        monkeypatch.undo()
        assert run(tmp_path, a_recipe()) == []
        assert run(tmp_path, a_recipe(gates={"max_ppl_ratio": 9.0})) == ["card"]

    def test_another_model_repeats_everything(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        log = run(tmp_path, a_recipe(), model="other weights")
        assert log[:2] == ["spectrum", "scores"]

    def test_equal_results_end_the_repetition(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "scores").unlink()
        assert run(tmp_path, a_recipe()) == ["scores"]

    def test_what_was_changed_by_hand_is_refused_before_any_stage_runs(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "hf" / "config.json").write_text("fine-tuned")
        with pytest.raises(RecipeError, match=r"lost: hf/config.json \(changed since it was written\)"):
            run(tmp_path, a_recipe(), model="other weights")
        with pytest.raises(RecipeError, match=r"hf/config\.json"):
            run(tmp_path, a_recipe())
        assert (tmp_path / "scores").read_text() == "scores wrote scores"
        assert (tmp_path / "hf" / "config.json").read_text() == "fine-tuned"

    def test_what_was_added_to_a_folder_is_refused_when_the_folder_is_to_be_replaced(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "hf" / "notes.md").write_text("mine")
        assert run(tmp_path, a_recipe()) == []
        with pytest.raises(RecipeError, match=r"hf/notes.md \(not written by soco-export\)"):
            run(tmp_path, a_recipe(), model="other weights")
        assert (tmp_path / "scores").read_text() == "scores wrote scores"

    @pytest.mark.parametrize("moment", range(8))
    def test_a_death_while_results_are_installed_leaves_whole_folders(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
    ) -> None:
        """`hf` is replaced by a longer one; killed at any rename, the folder is one version, whole, or is not there."""
        run(tmp_path, a_recipe())
        longer = Stage[Log]("hf", ("plan", "model"), (), ("hf",), writer("new", "hf/config.json", "hf/second.json"))
        stages = (SPECTRUM, SCORES, PLAN, longer, CARD)
        steps = iter(range(100))

        def dying(name: str) -> Callable[..., None]:
            original = getattr(os, name)

            def call(*arguments: object) -> None:
                if next(steps) == moment:
                    raise KeyboardInterrupt
                original(*arguments)

            return call

        for name in ("rename", "replace"):
            monkeypatch.setattr(os, name, dying(name))
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, a_recipe(), stages)
        monkeypatch.undo()
        files = {path.name for path in (tmp_path / "hf").iterdir()} if (tmp_path / "hf").exists() else set()
        assert files in (set(), {"config.json", "README.md"}, {"config.json", "second.json"})
        run(tmp_path, a_recipe(), stages)
        assert {path.name for path in (tmp_path / "hf").iterdir()} == {"config.json", "second.json", "README.md"}
        assert run(tmp_path, a_recipe(), stages) == []

    def test_a_deleted_cache_is_not_missed(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "spectrum" / "a").unlink()
        assert run(tmp_path, a_recipe()) == []

    def test_a_deleted_cache_is_made_again_when_it_is_read(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "spectrum" / "a").unlink()
        (tmp_path / "scores").unlink()
        assert run(tmp_path, a_recipe()) == ["spectrum", "scores"]

    def test_an_interrupted_stage_finds_its_workspace_and_leaves_no_result(self, tmp_path: Path) -> None:
        seen: Log = []

        def killed(log: Log, out: Path) -> None:
            seen.extend(path.name for path in out.iterdir())
            (out / "checkpoint").write_text("half")
            (out / "scores").write_text("half")
            (out / ".hf.ab12.partial").mkdir(exist_ok=True)  # a folder that was being written, with a file of it
            (out / ".hf.ab12.partial" / ".config.json.77.partial").write_text("half")
            if len(seen) < 1:
                raise KeyboardInterrupt

        stages = (Stage[Log]("scores", ("model",), (), ("scores",), killed),)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, a_recipe(), stages)
        assert not (tmp_path / "scores").exists()
        manifest = Manifest.load(tmp_path)
        assert manifest is not None
        assert manifest.stages["scores"].status == "running"
        run(tmp_path, a_recipe(), stages)
        assert seen == ["checkpoint"]
        assert (tmp_path / "scores").exists()
        assert list((tmp_path / UNFINISHED).iterdir()) == []

    def test_the_workspace_of_another_task_is_not_taken_up(self, tmp_path: Path) -> None:
        seen: Log = []

        def killed(log: Log, out: Path) -> None:
            seen.extend(path.name for path in out.iterdir())
            (out / "checkpoint").write_text("half")
            raise KeyboardInterrupt

        stages = (Stage[Log]("scores", ("model",), (), ("scores",), killed),)
        for model in ("one", "two"):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, a_recipe(), stages, model)
        assert seen == []
        assert len(list((tmp_path / UNFINISHED).iterdir())) == 1

    def test_stages_at_home_elsewhere(self, tmp_path: Path) -> None:
        one, two = tmp_path / "one", tmp_path / "two"
        run(one, a_recipe())
        log: Log = []
        with open_folder(one, a_recipe()) as parent, open_folder(two, a_recipe(keep_params=0.5)) as folder:
            homes = {"spectrum": parent, "scores": parent}
            Pipeline(folder, STAGES, log, {"model": lambda: "weights"}, homes).run()
        assert log == ["plan", "hf", "card"]
        assert not (two / "scores").exists()
        assert (two / "plan.json").exists()

    def test_events_say_why(self, tmp_path: Path) -> None:
        events: list[Event] = []
        for _ in range(2):
            with open_folder(tmp_path, a_recipe()) as folder:
                Pipeline(folder, (PLAN,), [], {"scores": lambda: "s"}, notify=events.append).run()
        assert [str(event.values[""]).split(" in ")[0] for event in events] == ["running", "done", "up to date"]
        assert [event.mark for event in events] == ["begun", "done", "skipped"]


class Fail(Exception):
    """As ONNX Runtime's, which is no RuntimeError."""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "disk is full"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "disk is full"),
        (MemoryError(), "out of memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 GiB"), "out of memory"),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (Fail("Failed to allocate memory for requested buffer of size 8589934592"), "out of memory"),
        (RuntimeError("unable to mmap 8 bytes from file: Cannot allocate memory (12)"), "out of memory"),
        (RuntimeError("std::bad_alloc"), "out of memory"),
    ],
)
def test_what_the_machine_lacks_is_said(tmp_path: Path, error: Exception, words: str) -> None:
    def fail(log: Log, out: Path) -> None:
        raise error

    with pytest.raises(MachineError, match=words):
        run(tmp_path, a_recipe(), (Stage[Log]("scores", ("model",), (), ("scores",), fail),))
    assert run(tmp_path, a_recipe()) == [stage.name for stage in STAGES]


@pytest.mark.parametrize(
    "error", [OSError("no number"), RuntimeError("the allocation differs"), SafetensorError("header")]
)
def test_other_errors_are_ours(tmp_path: Path, error: Exception) -> None:
    def fail(log: Log, out: Path) -> None:
        raise error

    with pytest.raises(type(error)):
        run(tmp_path, a_recipe(), (Stage[Log]("scores", ("model",), (), ("scores",), fail),))


class TestFolder:
    def test_another_recipe_is_refused_and_nothing_lost(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(RecipeError, match="another run: keep_params differs") as error:
            run(tmp_path, a_recipe(keep_params=0.5))
        assert "--fresh" in error.value.fix
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before

    def test_fresh_starts_over_and_keeps_each_result_until_the_new_one_is_whole(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        with open_folder(tmp_path, a_recipe(keep_params=0.5), fresh=True) as folder:
            assert folder.manifest.stages == {}
            assert (tmp_path / "hf" / "config.json").exists()
            Pipeline(folder, (SPECTRUM, SCORES), [], {"model": lambda: "weights"}).run()
        assert sorted(path.name for path in tmp_path.iterdir() if path.name != UNFINISHED) == sorted(
            ["scores", "spectrum", MANIFEST, LOCK, HELD]
        )

    def test_fresh_forgets_the_checkpoints_of_killed_stages(self, tmp_path: Path) -> None:
        def killed(log: Log, out: Path) -> None:
            log.extend(path.name for path in out.iterdir())
            (out / "checkpoint").write_text("half")
            raise KeyboardInterrupt

        stages = (Stage[Log]("scores", ("model",), (), ("scores",), killed),)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, a_recipe(), stages)
        (tmp_path / UNFINISHED / "mine.txt").write_text("mine")
        log: Log = []
        with open_folder(tmp_path, a_recipe(), fresh=True) as folder, pytest.raises(KeyboardInterrupt):
            Pipeline(folder, stages, log, {"model": lambda: "weights"}).run()
        assert log == []
        assert (tmp_path / UNFINISHED / "mine.txt").read_text() == "mine"

    @pytest.mark.parametrize("name", ["hf", UNFINISHED, MANIFEST, LOCK, HELD])
    @pytest.mark.parametrize("fresh", [False, True])
    def test_links_are_refused(self, tmp_path: Path, name: str, fresh: bool) -> None:
        root, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
        run(root, a_recipe())
        if (root / name).exists():
            (root / name).rename(elsewhere)
        (root / name).symlink_to(elsewhere)
        with pytest.raises(RecipeError, match=f"{name} is a link"):
            check_folder(root, a_recipe(), fresh)

    def test_a_run_that_died_before_it_began_goes_on(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe(), ())
        (tmp_path / LOCK).unlink()
        (tmp_path / ".manifest.json.77.partial").write_text("{")
        assert run(tmp_path, a_recipe()) == ["spectrum", "scores", "plan", "hf", "card"]
        assert not (tmp_path / ".manifest.json.77.partial").exists()

    def test_a_partial_file_alone_is_a_folder_to_begin_in(self, tmp_path: Path) -> None:
        (tmp_path / HELD).touch()
        (tmp_path / ".manifest.json.77.partial").write_text("{")
        assert run(tmp_path, a_recipe()) == ["spectrum", "scores", "plan", "hf", "card"]

    def test_a_run_without_its_manifest_is_named(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / MANIFEST).unlink()
        with pytest.raises(RecipeError, match=r"has lost its manifest\.json"):
            check_folder(tmp_path, a_recipe(), fresh=True)

    def test_fresh_leaves_what_is_not_ours(self, tmp_path: Path) -> None:
        run(tmp_path, a_recipe())
        (tmp_path / "notes.txt").write_text("mine")
        with open_folder(tmp_path, a_recipe(), fresh=True):
            pass
        assert (tmp_path / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize("fresh", [False, True])
    def test_a_strangers_folder_is_never_written(self, tmp_path: Path, fresh: bool) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(RecipeError, match=r"no run of soco-export \(thesis.tex\)"):
            check_folder(tmp_path, a_recipe(), fresh)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_file_is_no_folder(self, tmp_path: Path) -> None:
        (tmp_path / "out").write_text("x")
        with pytest.raises(RecipeError, match="is a file"):
            check_folder(tmp_path / "out", a_recipe(), fresh=True)

    @pytest.mark.parametrize("fresh", [False, True])
    def test_another_programs_manifest_is_never_written_over(self, tmp_path: Path, fresh: bool) -> None:
        (tmp_path / MANIFEST).write_text('{"name": "web app"}')
        (tmp_path / "onnx").mkdir()
        (tmp_path / "onnx" / "precious").write_text("mine")
        with pytest.raises(RecipeError, match="not a manifest"), open_folder(tmp_path, a_recipe(), fresh=fresh):
            pass
        assert (tmp_path / MANIFEST).read_text() == '{"name": "web app"}'
        assert (tmp_path / "onnx" / "precious").exists()

    def test_two_processes_do_not_share_a_folder(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        held, done = spawn.Event(), spawn.Event()
        holder = spawn.Process(target=hold, args=(tmp_path, held, done))
        holder.start()
        try:
            assert held.wait(PATIENCE)
            with pytest.raises(RecipeError, match=f"in use by another process \\({holder.pid} on"):
                run(tmp_path, a_recipe())
        finally:
            done.set()
            holder.join()
        run(tmp_path, a_recipe())

    def test_a_dead_holder_does_not_hold(self, tmp_path: Path) -> None:
        spawn = multiprocessing.get_context("spawn")
        held, done = spawn.Event(), spawn.Event()
        holder = spawn.Process(target=hold, args=(tmp_path, held, done))
        holder.start()
        assert held.wait(PATIENCE)
        holder.kill()
        holder.join()
        assert run(tmp_path, a_recipe()) == ["spectrum", "scores", "plan", "hf", "card"]

    def test_differences_are_dotted_keys(self) -> None:
        other = a_recipe(train={"steps": 7}, keep_params=0.5, data={"path": "text.txt"})
        assert differences(a_recipe(), other) == ["keep_params", "data.path", "data.builtin", "train.steps"]

    def test_what_runs_write_is_listed_for_fresh(self) -> None:
        from soco_export.run.stages.artefacts import ARTEFACTS, DENSE_ONNX
        from soco_export.run.stages.training import TRAINING

        stages = {stage.name: stage for chain in ARTEFACTS.values() for stage in (*TRAINING, *chain, DENSE_ONNX)}
        assert {path.split("/")[0] for stage in stages.values() for path in stage.writes} <= set(CONTENT)


def hold(root: Path, held: multiprocessing.synchronize.Event, done: multiprocessing.synchronize.Event) -> None:
    with open_folder(root, a_recipe()):
        held.set()
        done.wait(PATIENCE)


def test_a_folder_is_a_value(tmp_path: Path) -> None:
    with open_folder(tmp_path, a_recipe()) as folder:
        assert isinstance(folder, RunFolder)
        assert folder.unfinished == tmp_path / UNFINISHED
