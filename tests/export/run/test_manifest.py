"""The manifest knows what is done, and says why something is not."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from soco_export.files.atomic import write_atomic
from soco_export.files.records import FileRecord, record_file
from soco_export.run.folder.manifest import Manifest, Process, StageRecord, record_outputs, stage_key, why_stale
from soco_export.run.folder.names import MANIFEST
from soco_train.errors import RecipeError

hashes = st.dictionaries(
    st.text(min_size=1, max_size=8), st.text("0123456789abcdef", min_size=4, max_size=4), max_size=4
)


def a_manifest() -> Manifest:
    return Manifest(
        model="tiny",
        argv=["soco-export", "train"],
        seed=3,
        versions={"python": "3.11"},
        process=Process(pid=1, host="here", started="2026-01-01T00:00:00"),
        stages={"plan": StageRecord(status="done", key="k", inputs={"scores": "1"}, seconds=1.5)},
    )


def finished(root: Path, outputs: tuple[str, ...], key: str = "key", others: tuple[str, ...] = ()) -> StageRecord:
    return StageRecord(status="done", key=key, outputs=record_outputs(root, outputs, others))


def test_a_manifest_survives_the_disk(tmp_path: Path) -> None:
    manifest = a_manifest()
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST]


def test_a_folder_without_manifest_has_none(tmp_path: Path) -> None:
    assert Manifest.load(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "{}", '{"schema_version": 99}', '["a list"]'])
def test_a_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(RecipeError, match="not a manifest"):
        Manifest.load(tmp_path)


def test_an_unknown_key_in_the_manifest_is_refused(tmp_path: Path) -> None:
    document = json.loads(a_manifest().model_dump_json())
    (tmp_path / MANIFEST).write_text(json.dumps({**document, "surprise": 1}))
    with pytest.raises(RecipeError):
        Manifest.load(tmp_path)


def test_a_crash_while_writing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    write_atomic(path, "old")

    def crash(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, "new")
    assert path.read_text() == "old"


@given(hashes, hashes)
def test_the_key_depends_on_every_input(one: dict[str, str], two: dict[str, str]) -> None:
    assert (stage_key({"a": 1}, one) == stage_key({"a": 1}, two)) == (one == two)


def test_the_key_depends_on_settings_and_not_on_their_order() -> None:
    assert stage_key({"a": 1, "b": 2}, {}) == stage_key({"b": 2, "a": 1}, {})
    assert stage_key({"a": 1}, {}) != stage_key({"a": 2}, {})
    assert stage_key({"a": 1}, {"x": "1"}) != stage_key({"a": 1}, {"y": "1"})


def test_a_known_file_is_not_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"12345")
    status = path.stat()
    known = FileRecord(sha256="as it was", bytes=5, modified_ns=status.st_mtime_ns)
    assert record_file(path, known) is known
    os.utime(path, ns=(0, 0))
    assert record_file(path, known).sha256 == "5994471abb01112afcc18159f6cc74b4f511b99806da59b3caf5a9c173cacfc5"


class TestWhyStale:
    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        (tmp_path / "hf").mkdir()
        (tmp_path / "hf" / "config.json").write_text("{}")
        (tmp_path / "hf" / "README.md").write_text("card")
        (tmp_path / "plan.json").write_text("plan")
        return tmp_path

    def test_nothing_when_all_agrees(self, root: Path) -> None:
        assert why_stale(root, finished(root, ("hf", "plan.json")), "key") == ""

    def test_no_record(self, root: Path) -> None:
        assert why_stale(root, None, "key") == "not run yet"

    def test_interrupted(self, root: Path) -> None:
        assert "interrupted" in why_stale(root, StageRecord(status="running", key="key"), "key")

    def test_other_key(self, root: Path) -> None:
        assert "settings or inputs" in why_stale(root, finished(root, ("hf",), key="other"), "key")

    def test_a_missing_file(self, root: Path) -> None:
        record = finished(root, ("hf", "plan.json"))
        (root / "hf" / "config.json").unlink()
        assert why_stale(root, record, "key") == "hf/config.json is gone"

    def test_a_truncated_file(self, root: Path) -> None:
        record = finished(root, ("hf", "plan.json"))
        (root / "plan.json").write_text("pla")
        assert why_stale(root, record, "key") == "plan.json was changed"

    def test_a_file_of_equal_content_written_later_is_fine(self, root: Path) -> None:
        record = finished(root, ("plan.json",))
        os.utime(root / "plan.json", ns=(1, 1))
        assert why_stale(root, record, "key") == ""

    def test_what_another_stage_owns_may_change(self, root: Path) -> None:
        record = finished(root, ("hf",), others=("hf/README.md",))
        (root / "hf" / "README.md").write_text("card with results")
        assert why_stale(root, record, "key") == ""
