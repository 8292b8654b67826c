"""Texts, items and profiles come from anywhere: every door answers with its value or with an error of ours, at once."""

from __future__ import annotations

import gzip
import json
import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from soco_export.bench.layer_times import Conditions, FormTimes, Profile
from soco_export.evaluate.items import FORMATS, load_items
from soco_export.evaluate.settings import TaskSettings
from soco_train.data.corpus import load_blocks
from soco_train.data.reading import READ_AT_ONCE, decoded, read_lines
from soco_train.errors import DataError, SocoError
from soco_train.settings.data import DataSettings
from tests.support.fresh import examples

FEW = settings(
    max_examples=examples(60), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


class Words:
    """A tokenizer of one token a word that counts what it was given."""

    given = 0

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        self.given += len(text)
        return {"input_ids": [len(word) for word in text.split()]}


def blocks(path: Path, **values: Any) -> torch.Tensor:
    return load_blocks(Words(), DataSettings(path=path, **{"block": 8, **values}), "calibration").tokens


def value_or_error(read: Callable[[], Any]) -> Any:
    """Return what `read` answers with: its value, or the error of ours that it raises; nothing else may escape."""
    try:
        return read()
    except SocoError as error:
        return error


@FEW
@given(st.binary(max_size=400), st.sampled_from(["a.txt", "a.jsonl", "a.JSONL.gz", "a.raw", "a.json"]))
def test_any_bytes_are_blocks_or_an_error_of_ours(tmp_path: Path, data: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(data)
    found = value_or_error(lambda: blocks(tmp_path / name))
    if isinstance(found, SocoError):
        assert name.split(".")[0] in found.where
        assert found.fix
    else:
        assert found.shape[1] == 8


@FEW
@given(st.lists(JSON, max_size=4))
def test_any_lines_are_documents_or_refused_by_line(tmp_path: Path, values: list[Any]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps(value) for value in [{"text": "a " * 9}, *values]), encoding="utf-8")
    good = [isinstance(v, dict) and isinstance(v.get("text"), str) for v in values]
    found = value_or_error(lambda: blocks(path))
    if not all(good):
        assert isinstance(found, DataError)
        assert found.where == f"{path}:{2 + good.index(False)}"


@FEW
@given(st.data())
def test_any_item_is_read_or_refused_by_line(tmp_path: Path, data: st.DataObject) -> None:
    fields = data.draw(st.sampled_from([sorted(fields) for fields in FORMATS]))
    row = {name: data.draw(JSON) for name in fields}
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(row), encoding="utf-8")
    found = value_or_error(lambda: load_items(TaskSettings(path=path)))
    if isinstance(found, SocoError):
        assert found.where == f"{path}:1"
    else:
        (item,) = found
        assert all(isinstance(choice, str) and choice.strip() for choice in item.choices)
        assert isinstance(item.choices[item.label], str)
        "".join((item.context, *item.choices)).encode()


@FEW
@given(
    st.recursive(JSON, lambda inner: st.fixed_dictionaries({"conditions": inner, "multiple": inner, "layers": inner}))
)
def test_any_json_is_a_profile_or_an_error_of_ours(value: Any) -> None:
    with pytest.raises(DataError, match="no latency profile"):
        Profile.from_json(json.dumps(value))


@pytest.mark.parametrize(
    "change",
    [
        {"dense": []},
        {"dense": [float("nan")]},
        {"dense": [-1.0]},
        {"ranks": [4, 2]},
        {"ranks": [0, 2]},
        {"ranks": []},
        {"times": [[1.0]]},
        {"times": [[1.0], [float("inf")]]},
        {"times": [[1.0], ["x"]]},
    ],
)
def test_a_profile_of_no_measurement_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    conditions = Conditions("cpu", "p", 1, "r", "float32", "same", "", False, (1,))
    whole = Profile(conditions, 8, {(4, 6): {"stacked": FormTimes((2.0,), (2, 4), ((1.0,), (2.0,)))}})
    assert Profile.from_json(whole.to_json()) == whole
    document = json.loads(whole.to_json())
    document["layers"]["4x6"]["stacked"] |= change
    (tmp_path / "it.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="no latency profile") as found:
        Profile.load(tmp_path / "it.json")
    assert found.value.where == str(tmp_path / "it.json")
    for name in ("4", "4x", "0x6", "9" * 5000 + "x6", "-4x6", "04x6", "４x6"):
        with pytest.raises(DataError, match="no latency profile"):
            Profile.from_json(json.dumps(document | {"layers": {name: {}}}))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"text": None}, "null"),
        ({"text": 3}, "a int"),
        ({"text": ["a"]}, "a list"),
        ({"content": "x", "url": "y"}, "'content', 'url'"),
        ({"text": "a\ud800"}, r"U\+D800"),
        ({"text": "a\0"}, r"U\+0000"),
        ([{"text": "x"}], "list"),
    ],
)
def test_what_is_no_text_is_named(value: Any, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"text": "fine"}\n\n' + json.dumps(value), encoding="utf-8")
    with pytest.raises(DataError, match=words) as found:
        blocks(path)
    assert found.value.where == f"{path}:3"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("text".encode("utf-16"), "UTF-16"),
        (b"PAR1....", "Parquet"),
        (b"PK\x03\x04..", "zip"),
        (b"a\0b", "NUL"),
        (b" \n\t\n", "blank"),
        (b"", "blank"),
        (gzip.compress(b"a " * 9999, mtime=0)[:-30], "damaged"),
    ],
)
def test_what_is_another_format_is_named(data: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(DataError, match=words):
        blocks(tmp_path / "a.txt")


def test_nothing_waits_for_a_pipe_or_a_device(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    start = time.process_time()
    for path in (tmp_path / "pipe", Path("/dev/zero"), tmp_path, tmp_path / "a\0b", tmp_path / ("x" * 300)):
        with pytest.raises(SocoError):
            blocks(path)
    (tmp_path / "deep.jsonl").write_text("[" * 100_000)
    with pytest.raises(DataError, match=r"nested too deeply|no JSON"):
        blocks(tmp_path / "deep.jsonl")
    for name in ("environ", "mem"):  # a kernel's file, which is plain, and has no end or no beginning
        with pytest.raises(SocoError, match="cannot read"):
            blocks(Path("/proc/self") / name)
    assert time.process_time() - start < 2  # this process's own: who waited would wait until the test's timeout


@pytest.mark.parametrize(("line", "words"), [("\n", "blank lines"), ("[", "has no end")])
def test_packed_lines_without_end_are_refused_soon(tmp_path: Path, line: str, words: str) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.encode() * (1 << 25), 1))
    with pytest.raises(DataError, match=words):
        blocks(tmp_path / "a.jsonl.gz")


def test_packed_lines_and_pieces_are_the_same_text(tmp_path: Path) -> None:
    words = ["é", "漢字", "\r\n", "\n", "a", "\u2028"]
    text = "".join(random.choices(words, k=3 * READ_AT_ONCE))
    for name, data in (("a.txt", text.encode()), ("a.txt.gz", gzip.compress(b"\xef\xbb\xbf" + text.encode()))):
        (tmp_path / name).write_bytes(data)
        assert "".join(decoded(tmp_path / name)) == text.replace("\r\n", "\n")
    expected = [(i, line) for i, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1) if line.strip()]
    assert list(read_lines(tmp_path / "a.txt")) == expected


@pytest.mark.parametrize("name", ["a.txt", "a.raw", "a.jsonl", "one-document.jsonl"])
def test_only_as_much_is_tokenised_as_the_blocks_need(name: str, tmp_path: Path) -> None:
    lines = [" ".join(random.choices(["a", "bb", "ccc", "dddd"], k=20)) for _ in range(40_000)]
    documents = lines if name == "a.jsonl" else ["\n".join(lines)]
    shaped = [json.dumps({"text": document}) for document in documents] if name.endswith("jsonl") else lines
    (tmp_path / name).write_text("\n".join(shaped))
    tokenizer = Words()
    few = load_blocks(tokenizer, DataSettings(path=tmp_path / name, block=64, blocks=8), "calibration").tokens
    assert tokenizer.given < 6 * READ_AT_ONCE < sum(map(len, lines)) / 4
    assert torch.equal(few, blocks(tmp_path / name, block=64)[:8])


class PanicException(BaseException):
    """As the tokenizers library raises it."""


def test_a_tokenizer_that_gives_up_is_named(tmp_path: Path) -> None:
    def give_up(text: str, **options: object) -> None:
        raise PanicException("retry-limit-in-match over")

    (tmp_path / "a.txt").write_text("a " * 99)
    for blocks_wanted in (None, 4):
        with pytest.raises(DataError, match="retry-limit"):
            load_blocks(give_up, DataSettings(path=tmp_path / "a.txt", block=8, blocks=blocks_wanted), "calibration")


def test_a_git_lfs_pointer_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(SocoError, match="git-lfs pointer"):
        list(decoded(tmp_path / "a.txt"))
