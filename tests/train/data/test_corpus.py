"""Texts become blocks: every source, the fingerprint, and each kind of bad text."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from soco_train.data import corpus
from soco_train.data.corpus import join_wikitext, load_blocks
from soco_train.errors import DataError, RecipeError
from soco_train.settings.data import DataSettings


def characters(text: str, **options: object) -> dict[str, list[int]]:
    """A tokenizer of one token a character; special tokens would show as -1."""
    assert options["add_special_tokens"] is False
    return {"input_ids": [ord(c) for c in text]}


def written(folder: Path, text: str | bytes, name: str = "text.txt") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def decoded(tokens: torch.Tensor) -> str:
    return "".join(chr(i) for i in tokens.flatten().tolist())


def test_blocks_are_consecutive_and_the_rest_is_dropped(tmp_path: Path) -> None:
    text = "".join(random.choices("abc dé\n", k=random.randint(100, 300)))
    blocks = load_blocks(characters, DataSettings(path=written(tmp_path, text), block=16), "calibration")
    assert blocks.tokens.shape == (len(text) // 16, 16)
    assert blocks.tokens.dtype == torch.int64
    assert decoded(blocks.tokens) == text[: len(text) // 16 * 16]


def test_a_cap_takes_the_first_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, "".join(random.choices("abc", k=200)))
    every = load_blocks(characters, DataSettings(path=path, block=8), "calibration")
    three = load_blocks(characters, DataSettings(path=path, block=8, blocks=3), "calibration")
    assert torch.equal(three.tokens, every.tokens[:3])


def test_fingerprint_follows_tokens_and_block_size(tmp_path: Path) -> None:
    path = written(tmp_path, "x" * 64)
    first = load_blocks(characters, DataSettings(path=path, block=16), "calibration")
    again = load_blocks(characters, DataSettings(path=path, block=16), "evaluation")
    other = load_blocks(characters, DataSettings(path=path, block=32), "calibration")
    changed = load_blocks(characters, DataSettings(path=written(tmp_path, "x" * 63 + "y"), block=16), "calibration")
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, other.fingerprint, changed.fingerprint}) == 3


def test_marks_of_other_editors_are_not_text(tmp_path: Path) -> None:
    path = written(tmp_path, b"\xef\xbb\xbfline one\r\nline two")
    assert decoded(load_blocks(characters, DataSettings(path=path, block=17), "calibration").tokens) == (
        "line one\nline two"
    )


def test_jsonl_documents_are_joined(tmp_path: Path) -> None:
    def settings(*texts: str) -> DataSettings:
        lines = "\n".join(json.dumps({"text": text, "url": "-"}) for text in texts) + "\n"
        return DataSettings(path=written(tmp_path, lines, "more.jsonl"), block=8)

    assert decoded(load_blocks(characters, settings("one", "twö"), "calibration").tokens) == "one\n\ntwö"
    assert decoded(load_blocks(characters, settings("", "one", " \n", "twö"), "calibration").tokens) == "one\n\ntwö"
    with pytest.raises(DataError, match="has 0 tokens"):
        load_blocks(characters, settings(*[""] * 20), "calibration")


def test_any_first_blocks_of_several_texts_are_a_fair_mixture(tmp_path: Path) -> None:
    sizes = {"a": random.randint(3, 40), "b": random.randint(3, 40), "c": 1}
    paths = tuple(written(tmp_path, letter * 8 * size, f"{letter}.txt") for letter, size in sizes.items())
    blocks = load_blocks(characters, DataSettings(path=paths, block=8), "calibration")
    letters = "".join(decoded(block[:1]) for block in blocks.tokens)
    assert blocks.domains == tuple(str(tmp_path / f"{letter}.txt") for letter in letters)
    total = sum(sizes.values())
    for count in range(1, total + 1):
        for letter, size in sizes.items():
            assert abs(letters[:count].count(letter) - count * size / total) < len(sizes)
    assert len(letters) == total


def test_the_order_within_a_text_stays(tmp_path: Path) -> None:
    first = written(tmp_path, "abcdefgh" + "ijklmnop" + "qrstuvwx", "first.txt")
    second = written(tmp_path, "01234567", "second.txt")
    tokens = load_blocks(characters, DataSettings(path=(first, second), block=8), "calibration").tokens
    assert decoded(tokens) == "abcdefgh" + "ijklmnop" + "01234567" + "qrstuvwx"


def test_wikitext_rows_are_joined_as_the_data_set_would() -> None:
    rows = ["", " = Title = \n", "", " Text one . \n", " Text two . \n", ""]
    raw = "".join(row or " \n" for row in rows)
    assert join_wikitext(raw) == "\n\n".join(rows)


def test_raw_suffix_means_wikitext(tmp_path: Path) -> None:
    path = written(tmp_path, " \n = A = \n \n", "wiki.test.raw")
    text = decoded(load_blocks(characters, DataSettings(path=path, block=8), "evaluation").tokens)
    assert "\n\n = A = \n\n\n".startswith(text)


@pytest.mark.parametrize("name", ["time-machine", "speeches"])
def test_builtin_halves_are_disjoint(name: str) -> None:
    halves = [
        (corpus.BUILTIN / f"{name}.{purpose}.txt").read_text("utf-8") for purpose in ("calibration", "evaluation")
    ]
    paragraphs = [{p for p in half.split("\n") if len(p) > 60} for half in halves]
    assert paragraphs[0]
    assert not paragraphs[0] & paragraphs[1]
    blocks = load_blocks(characters, DataSettings(builtin=name, block=512), "evaluation")
    assert blocks.source == f"built-in text {name}.evaluation"


def test_too_short_a_text_says_found_and_needed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 40 tokens, and one block needs 64") as caught:
        load_blocks(characters, DataSettings(path=written(tmp_path, "a" * 40), block=64), "evaluation")
    assert "evaluation.block to 40" in caught.value.fix


def test_text_that_is_not_utf8_names_the_offset(tmp_path: Path) -> None:
    path = written(tmp_path, b"plain " + "é".encode("latin-1") + b" text")
    with pytest.raises(DataError, match="0xe9 at offset 6"):
        load_blocks(characters, DataSettings(path=path, block=8), "calibration")


def test_a_missing_file_is_found_early(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file"):
        load_blocks(characters, DataSettings(path=tmp_path / "absent.txt"), "calibration")


@pytest.mark.parametrize("line", ["{broken", '{"body": "x"}', '"just text"'])
def test_a_bad_jsonl_line_is_named(tmp_path: Path, line: str) -> None:
    path = written(tmp_path, '{"text": "fine"}\n' + line, "data.jsonl")
    with pytest.raises(DataError, match=r"line 2|no field text \(there is 'body'\)") as caught:
        load_blocks(characters, DataSettings(path=path, block=8), "calibration")
    assert caught.value.where == f"{path}:2"


def test_hub_without_datasets_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(RecipeError, match="needs the package datasets") as caught:
        corpus.check_source(DataSettings(hub="a/b:c:train"), "calibration")
    assert "[data]" in caught.value.fix


def test_hub_rows_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def load_dataset(name: str, config: str | None, split: str) -> dict[str, list[str]]:
        asked.append((name, config, split))
        return {"text": ["", "abc\n", "defgh"]}

    monkeypatch.setitem(__import__("sys").modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    blocks = load_blocks(characters, DataSettings(hub="a/b:c:train", block=12), "calibration")
    assert decoded(blocks.tokens) == "\n\nabc\n\n\ndefg"
    assert asked == [("a/b", "c", "train")]


def test_a_bad_hub_address_is_refused() -> None:
    with pytest.raises(RecipeError, match="cannot read the data set address"):
        corpus.check_source(DataSettings(hub="wikitext"), "calibration")
