"""Nothing is deleted or written over but what our own records list, to the hash."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from soco_export.files.atomic import remove, write_atomic
from soco_export.files.records import check_apart, not_ours, record_files
from soco_export.files.replacing import LISTING, Listing, check_replaceable, replacing_folder
from soco_train.errors import RecipeError


def make(out: Path, text: str = "old") -> Path:
    with replacing_folder(out) as folder:
        (folder / "sub").mkdir()
        (folder / "model.onnx").write_text(text)
        (folder / "sub" / "weights").write_text(text)
    return out


class TestReplacingFolder:
    def test_what_it_made_it_replaces(self, tmp_path: Path) -> None:
        out = make(make(tmp_path / "out"), "new")
        assert (out / "model.onnx").read_text() == (out / "sub" / "weights").read_text() == "new"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_the_same_files_give_the_same_listing_and_usual_modes(self, tmp_path: Path) -> None:
        one, two, plain = make(tmp_path / "one"), make(tmp_path / "two"), tmp_path / "plain"
        plain.mkdir()
        assert (one / LISTING).read_bytes() == (two / LISTING).read_bytes()
        assert one.stat().st_mode == plain.stat().st_mode

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda out: (out / "notes").write_text("mine"), r"notes \(not written"),
            (lambda out: (out / "sub" / "notes").write_text("mine"), r"sub/notes \(not written"),
            (lambda out: (out / "sub" / "weights").write_text("tuned"), r"sub/weights \(changed"),
            (lambda out: (out / "aside").symlink_to(out.parent), r"aside \(a link\)"),
            (lambda out: os.mkfifo(out / "sub" / "pipe"), r"sub/pipe \(a pipe or a device\)"),
            (lambda out: (out / LISTING).unlink(), r"model.onnx \(not written"),
            (lambda out: (out / LISTING).write_text('{"files": {}, "name": "app"}'), r"model.onnx \(not written"),
        ],
    )
    def test_what_is_not_its_own_stops_it(self, tmp_path: Path, change: Callable[[Path], object], words: str) -> None:
        out = make(tmp_path / "out")
        change(out)
        with pytest.raises(RecipeError, match=words):
            make(out, "new")
        assert (out / "model.onnx").read_text() == "old"

    def test_a_change_made_while_the_new_one_is_made_stops_it_too(self, tmp_path: Path) -> None:
        out = make(tmp_path / "out")
        with pytest.raises(RecipeError, match="notes"), replacing_folder(out):
            (out / "notes").write_text("mine")
        assert (out / "notes").read_text() == "mine"

    def test_files_links_and_the_working_directory_are_refused(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        monkeypatch.chdir(tmp_path / "real")
        for name, words in (("file", "is a file"), ("link", "is a link"), ("real", "working directory")):
            with pytest.raises(RecipeError, match=words):
                check_replaceable(tmp_path / name)
        with pytest.raises(RecipeError, match="working directory"), replacing_folder(Path()):
            pass

    def test_a_failure_leaves_the_old_one_and_nothing_else(self, tmp_path: Path) -> None:
        out = make(tmp_path / "out")
        with pytest.raises(OSError, match="disk full"), replacing_folder(out):
            raise OSError("disk full")
        assert (out / "model.onnx").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_siblings_of_the_user_are_left_alone(self, tmp_path: Path) -> None:
        for name in (".out.old", ".out.partial", ".out.abcdefgh.old", ".out.abcdefgh.partial"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "precious").write_text("mine")
        for process in ("9" * 40, "9" * 5000, "-1", "x"):  # none that could have been ours
            (tmp_path / f".out.a{len(process)}.partial").mkdir()
            Listing(making=f"{process}@elsewhere").save(tmp_path / f".out.a{len(process)}.partial")
        Listing(making=f"{'9' * 40}@{socket.gethostname()}").save(tmp_path / ".out.a40.partial")
        make(make(tmp_path / "out"), "new")
        assert len(list(tmp_path.glob(".out.*/precious"))) == 4
        assert (tmp_path / ".out.a40.partial").exists()

    @pytest.mark.parametrize("fails_at", [0, 1])
    def test_the_old_one_outlives_a_rename_that_fails(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
    ) -> None:
        out, calls, rename = make(tmp_path / "out"), iter(range(9)), os.rename

        def refuse(source: Path, target: Path) -> None:
            if next(calls) == fails_at:
                raise PermissionError("no")
            rename(source, target)

        monkeypatch.setattr(os, "rename", refuse)
        with pytest.raises(PermissionError):
            make(out, "new")
        assert (out / "model.onnx").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_death_between_the_renames_is_made_good(self, tmp_path: Path) -> None:
        make(tmp_path / "out").rename(tmp_path / ".out.abcdefgh.old")
        dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
        partial = tmp_path / ".out.abcdefgh.partial"
        partial.mkdir()
        (partial / "half").write_text("x")
        Listing(making=f"{int(dead.stdout)}@{socket.gethostname()}").save(partial)
        with pytest.raises(OSError, match="disk full"), replacing_folder(tmp_path / "out"):
            raise OSError("disk full")
        assert (tmp_path / "out" / "model.onnx").read_text() == "old"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_a_living_process_keeps_its_partial_folder(self, tmp_path: Path) -> None:
        make(tmp_path / "out")
        with replacing_folder(tmp_path / "out") as one:
            make(tmp_path / "out", "other")
            assert one.exists()
            with pytest.raises(RecipeError), replacing_folder(tmp_path / "out"):
                (tmp_path / "out" / "notes").write_text("mine")
            (tmp_path / "out" / "notes").unlink()

    def test_what_another_process_writes_is_left_to_it(self, tmp_path: Path) -> None:
        partial = tmp_path / ".out.abcdefgh.partial"
        partial.mkdir()
        Listing(making=f"{os.getppid()}@{socket.gethostname()}").save(partial)
        with pytest.raises(RecipeError, match="is being written by another process"):
            make(tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_a_process_younger_than_what_is_half_made_is_another(self, tmp_path: Path) -> None:
        partial = tmp_path / ".out.abcdefgh.partial"
        partial.mkdir()
        Listing(making=f"{os.getppid()}@{socket.gethostname()}").save(partial)
        os.utime(partial / LISTING, (1, 1))
        make(tmp_path / "out")
        assert (tmp_path / "out").exists()

    def test_a_new_folder_is_not_put_over_one_that_came_first(self, tmp_path: Path) -> None:
        def overtaken() -> None:
            with replacing_folder(tmp_path / "out") as late:
                (late / "model.onnx").write_text("late")
                make(tmp_path / "out", "early")

        with pytest.raises(RecipeError, match="by another process meanwhile"):
            overtaken()
        assert (tmp_path / "out" / "model.onnx").read_text() == "early"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]

    def test_of_two_that_replace_at_once_one_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out, rename = make(tmp_path / "out"), os.rename

        def overtaken(source: Path, target: Path) -> None:
            rename(source, target)
            if target.suffix == ".old":
                out.mkdir()
                (out / "model.onnx").write_text("early")

        monkeypatch.setattr(os, "rename", overtaken)
        with pytest.raises(RecipeError, match="by another process meanwhile"):
            make(out, "late")
        assert (out / "model.onnx").read_text() == "early"
        assert [path.name for path in tmp_path.iterdir()] == ["out"]


class TestApart:
    @pytest.mark.parametrize(
        ("out", "words"),
        [("model", " is the"), ("model/x", " lies in the"), (".", " contains the"), ("x/../model", "is")],
    )
    def test_an_output_in_an_input_is_refused(self, tmp_path: Path, out: str, words: str) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "x").mkdir()
        with pytest.raises(RecipeError, match=words):
            check_apart(tmp_path / out, [tmp_path / "model"])

    def test_through_links_too(self, tmp_path: Path) -> None:
        (tmp_path / "model").mkdir()
        (tmp_path / "alias").symlink_to(tmp_path / "model")
        with pytest.raises(RecipeError, match="lies in"):
            check_apart(tmp_path / "model" / "out", [tmp_path / "alias"])

    def test_a_sibling_is_fine(self, tmp_path: Path) -> None:
        check_apart(tmp_path / "model-onnx", [tmp_path / "model"])


class TestAtomic:
    @pytest.mark.parametrize(
        "name", ["file.json.partial", f".file.json.{os.getpid()}.partial"], ids=["by-name", "by-process"]
    )
    def test_a_link_under_the_partial_name_is_not_written_through(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "precious").write_text("mine")
        (tmp_path / name).symlink_to(tmp_path / "precious")
        write_atomic(tmp_path / "file.json", "new")
        assert (tmp_path / "precious").read_text() == "mine"
        assert (tmp_path / "file.json").read_text() == "new"

    def test_removing_a_link_leaves_what_it_leads_to(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "precious").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "real")
        remove(tmp_path / "link")
        assert (tmp_path / "real" / "precious").exists()


def test_a_file_with_the_same_content_is_ours_whenever_it_was_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    known = {name: [record] for name, record in record_files(tmp_path, ["a"]).items()}
    os.utime(tmp_path / "a", (1, 1))
    assert not_ours(tmp_path, ["a"], known) == []
    (tmp_path / "a").write_text("y")
    assert not_ours(tmp_path, ["a"], known) == ["a (changed since it was written)"]


def test_a_mount_point_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    with pytest.raises(RecipeError, match="mount point"), replacing_folder(tmp_path):
        pytest.fail("work has begun")
