"""Packing: bit for bit there and back, smaller where the numbers allow, and nothing written from a hostile archive."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from soco_export.files import pack as container
from soco_export.files.coding import BLOCK, decode, encode
from soco_export.files.pack import MAGIC, pack_folder, unpack_file
from soco_export.files.replacing import LISTING
from soco_train.errors import DataError, MachineError, RecipeError
from soco_train.events import Event
from tests.support.cli import contents, soco
from tests.support.fresh import rng

DIGEST = "0" * 64


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder that looks like an export: text, floats of more than a block, odd sizes, an empty file."""
    made = tmp_path / "model"
    (made / "inner").mkdir(parents=True)
    (made / "config.json").write_text('{"model_type": "llama"}')
    weights = rng().normal(size=BLOCK // 4 + 1000).astype(np.float32).tobytes()
    (made / "model.safetensors").write_bytes(weights + b"abc")
    (made / "inner" / "empty.bin").write_bytes(b"")
    return made


def archive(path: Path, files: dict[str, object], rest: bytes = b"") -> Path:
    text = json.dumps({"files": files}).encode()
    path.write_bytes(MAGIC + len(text).to_bytes(8, "little") + text + rest)
    return path


@pytest.mark.parametrize("size", [1, 2, 3, 5, 4097, BLOCK])
@pytest.mark.parametrize("kind", ["noise", "float32", "zeros"])
def test_a_block_comes_back_bit_for_bit(size: int, kind: str) -> None:
    sources = {
        "noise": lambda: rng().bytes(size),
        "float32": lambda: rng().normal(size=size // 4 + 1).astype(np.float32).tobytes()[:size],
        "zeros": lambda: bytes(size),
    }
    block = sources[kind]()
    width, frames = encode(block)
    assert decode(frames, width, size) == block
    assert sum(map(len, frames)) < size + 64


def test_floats_are_parted_by_place_and_text_is_not() -> None:
    floats = rng().normal(size=BLOCK // 4).astype(np.float32).tobytes()
    width, frames = encode(floats)
    assert width == 4
    assert sum(map(len, frames)) < 0.90 * len(floats)  # 8 bits of sign and exponent in about 3
    assert encode(b"the words of a tokenizer " * 4000)[0] == 1


def test_a_folder_comes_back_bit_for_bit_and_tells_of_it(folder: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    packed = tmp_path / "a.socopack"
    pack_folder(folder, packed, events.append)
    unpack_file(packed, tmp_path / "back", events.append)
    back = contents(tmp_path / "back")
    assert LISTING in back  # of a folder of ours, as every export has it
    assert {name: data for name, data in back.items() if name != LISTING} == contents(folder)
    for stage in ("pack", "unpack"):
        told = [event for event in events if event.stage == stage]
        assert told[-1].step == told[-1].total == sum(map(len, contents(folder).values()))
    assert not list(tmp_path.glob(".*"))


def test_the_same_folder_gives_the_same_archive(folder: Path, tmp_path: Path) -> None:
    pack_folder(folder, tmp_path / "a")
    unpack_file(tmp_path / "a", tmp_path / "back")
    pack_folder(tmp_path / "back", tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_nothing_is_written_over(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.socopack"
    pack_folder(folder, packed)
    before = packed.read_bytes()
    with pytest.raises(RecipeError, match="is there already"):
        pack_folder(folder, packed)
    with pytest.raises(RecipeError, match="is there already"):
        unpack_file(packed, folder)
    with pytest.raises(RecipeError, match="lies in the folder"):
        pack_folder(folder, folder / "a")
    assert packed.read_bytes() == before


@pytest.mark.parametrize(
    "name",
    ["../out", "/etc/out", "a/../../out", "a//b", "./a", "", "a\\b", "C:a", "a\x00b", "a.", "x" * 600, LISTING, "a/"],
)
def test_a_name_that_leads_out_is_refused(name: str, tmp_path: Path) -> None:
    bad = archive(tmp_path / "bad", {name: {"bytes": 0, "sha256": DIGEST}})
    with pytest.raises(DataError, match="names"):
        unpack_file(bad, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"a": {"bytes": 0, "sha256": DIGEST}, "A": {"bytes": 0, "sha256": DIGEST}},
        {"a": {"bytes": 0, "sha256": DIGEST}, "a/b": {"bytes": 0, "sha256": DIGEST}},
        {"a": {"bytes": -1, "sha256": DIGEST}},
        {"a": {"bytes": True, "sha256": DIGEST}},
        {"a": {"bytes": 1}},
        {"a": 5},
        {str(number): {"bytes": 0, "sha256": DIGEST} for number in range(container.MOST_FILES + 1)},
    ],
)
def test_contents_that_cannot_be_are_refused(files: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(DataError):
        unpack_file(archive(tmp_path / "bad", files), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    bad = archive(tmp_path / "bad", {"a": {"bytes": 1 << 60, "sha256": DIGEST}})
    with pytest.raises(MachineError, match="unpacks to"):
        unpack_file(bad, tmp_path / "out")


def test_a_frame_that_unpacks_to_more_than_it_may_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zstandard

    frame = zstandard.compress(bytes(1 << 24))
    # a frame that says its size is unpacked to it whatever limit is given: a few bytes would fill the memory
    monkeypatch.setattr(zstandard, "ZstdDecompressor", lambda: pytest.fail("it was unpacked"))
    rest = bytes([1]) + len(frame).to_bytes(4, "little") + frame
    bad = archive(tmp_path / "bad", {"a": {"bytes": 1000, "sha256": DIGEST}}, rest)
    with pytest.raises(DataError, match="block"):
        unpack_file(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_archive_that_was_changed_is_unpacked(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.socopack"
    pack_folder(folder, packed)
    whole = packed.read_bytes()
    for _ in range(20):
        changed = bytearray(whole)
        changed[rng().integers(len(whole))] ^= 1 << rng().integers(8)
        packed.write_bytes(changed)
        try:
            unpack_file(packed, tmp_path / "out")
        except (DataError, MachineError):
            assert not (tmp_path / "out").exists()
        else:  # the word for the contents' own hash was changed, and nothing that it is of
            found = {name: data for name, data in contents(tmp_path / "out").items() if name != LISTING}
            assert found == contents(folder)
            break
    for broken in (whole[:-1], whole + b"x", whole[: len(MAGIC) + 3], b"", b"PK"):
        packed.write_bytes(broken)
        with pytest.raises(DataError):
            unpack_file(packed, tmp_path / "other")


@pytest.mark.parametrize(
    "names", [[b"\xff"], [b"a:b"], [b"a\nb"], [b"A", b"a"], ["\u00e9".encode(), "e\u0301".encode()]]
)
def test_what_could_not_be_unpacked_anywhere_is_not_packed(names: list[bytes], folder: Path, tmp_path: Path) -> None:
    for name in names:
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).touch()
    with pytest.raises(RecipeError, match=r"there twice|not every system"):
        pack_folder(folder, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_name_that_was_changed_is_not_what_was_packed(folder: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.socopack"
    pack_folder(folder, packed)
    packed.write_bytes(packed.read_bytes().replace(b"config.json", b"confiG.json", 1))
    with pytest.raises(DataError, match="not what was packed"):
        unpack_file(packed, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_folder_is_in_the_way_of_an_archive(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    monkeypatch.setattr(container, "encode", lambda block: pytest.fail("it was packed"))
    with pytest.raises(RecipeError, match="is there already"):
        pack_folder(folder, tmp_path / "a")
    (folder / LISTING).mkdir()
    (folder / LISTING / "a").touch()
    with pytest.raises(RecipeError, match="own listing"):
        pack_folder(folder, tmp_path / "b")


def test_of_two_at_once_one_wins(folder: Path, tmp_path: Path) -> None:
    packed, out, events = tmp_path / "a.socopack", tmp_path / "out", iter(range(9))

    def overtaken(event: Event) -> None:
        if not next(events):
            (packed if event.stage == "pack" else out).write_text("early")

    with pytest.raises(RecipeError, match="is there already"):
        pack_folder(folder, packed, overtaken)
    assert packed.read_text() == "early"
    packed.unlink()
    pack_folder(folder, packed)
    events = iter(range(9))
    with pytest.raises(RecipeError, match="by another process meanwhile"):
        unpack_file(packed, out, overtaken)
    assert out.read_text() == "early"
    assert not list(tmp_path.glob(".*"))


def test_places_without_a_name_and_files_without_bytes(tmp_path: Path) -> None:
    assert soco("pack", "/").code == 2
    assert container.default_archive(Path("/onnx")) == Path("/onnx.socopack")
    assert soco("unpack", "/").code == 2
    assert soco("unpack", ".").code == 2
    (tmp_path / "config.json").touch()
    ran = soco("pack", tmp_path, "--out", tmp_path.with_name("a.socopack"))
    assert ran.code == 0
    assert "1 files · 0 → " in ran.out


def test_what_is_no_export_is_refused(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(RecipeError, match="holds no model"):
        pack_folder(tmp_path / "empty", tmp_path / "a")
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(RecipeError, match="is a link"):
        pack_folder(folder, tmp_path / "a")
    (folder / "link").unlink()
    os.mkfifo(folder / "inner" / "pipe")
    with pytest.raises(RecipeError, match="inner/pipe is a pipe or a device"):
        pack_folder(folder, tmp_path / "a")


def test_without_zstandard_it_says_what_to_install(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    ran = soco("pack", folder, "--out", tmp_path / "a")
    assert ran.code == 4
    assert "[pack]" in ran.err


def test_the_verbs(folder: Path, tmp_path: Path) -> None:
    packed = json.loads(soco("pack", folder, "--json").out)
    assert packed["file"] == str(tmp_path / "model.socopack")
    unpacked = json.loads(soco("unpack", packed["file"], "--out", tmp_path / "back", "--json").out)
    assert unpacked == {"folder": str(tmp_path / "back"), "files": 3, "bytes": packed["bytes"]}
