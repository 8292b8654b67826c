"""Strings of a model or a recipe do nothing to a terminal, a Markdown page or the lines around them."""

from __future__ import annotations

import unicodedata

import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from soco_export.files.text import as_yaml, fence, markdown, one_line, visible

ANY = st.text(st.characters(exclude_categories=()), max_size=40)


@given(ANY)
@example("\x1b[2J\x1b]0;title\x07\x9b31m\r\u202eevil\u2069\ud800\x7f\u2028")
def test_nothing_unseen_is_left(text: str) -> None:
    shown = visible(text)
    shown.encode("utf-8")
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs", "Zl", "Zp") for c in shown)
    assert not any(
        unicodedata.bidirectional(c) in ("RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI", "PDI") for c in shown
    )
    assert "\n" not in one_line(text)
    assert visible(shown) == shown


@given(ANY)
@example("\x1b[2J\u202eevil\u2069\ud800\x85\u2028")
def test_yaml_holds_it_and_shows_nothing_unseen(text: str) -> None:
    written = as_yaml({"a": text}, yaml.SafeDumper)
    assert visible(written) == written
    assert yaml.safe_load(written) == {"a": text}


@given(st.text(st.characters(categories=("L", "N", "P", "S", "Zs"), exclude_characters="\xad"), max_size=40))
def test_what_can_be_seen_stays(text: str) -> None:
    assert visible(text) == text


@given(st.text("ab`*_[]()<>|~$&\\!\n", max_size=30))
def test_markdown_shows_it_word_for_word(text: str) -> None:
    shown = markdown(text)
    plain, place = "", 0
    while place < len(shown):  # what is left after escapes are taken out can begin no markup
        if shown[place] == "\\":
            place += 1
        else:
            assert shown[place] not in "`*[]<>|~$&"
        plain += shown[place]
        place += 1
    assert plain == one_line(text)
    assert fence(text) not in text
