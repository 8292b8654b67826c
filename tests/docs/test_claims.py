"""Figures of the pages are those of the committed results, and there are no others."""

import random
import re

import pytest

from tools import claims, tables


def page_text(page):
    return (claims.ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", claims.PAGES)
def test_every_figure_is_one_that_was_measured_or_a_setting(page):
    text = page_text(page)
    assert [claim for claim in claims.claims(page, text) if not claim.agrees] == []
    assert claims.unbound(page, text) == []


@pytest.mark.parametrize("page", claims.PAGES)
def test_tables_are_what_the_results_give(page):
    text = page_text(page)
    assert tables.written(text) == text, "python -m tools.tables writes them"


def test_every_table_and_every_result_that_is_bound_is_used():
    pages = {page: page_text(page) for page in claims.PAGES}
    assert sorted(name for text in pages.values() for name, _ in tables.tables(text)) == sorted(tables.TABLES)
    for setting in claims.DOCUMENT["settings"]:
        pattern = claims._pattern(setting)
        assert any(pattern.search(text) for text in pages.values()), f"no page says {setting}"


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md", "docs/onnx.md"])
def test_a_figure_that_was_changed_or_added_is_found(page):
    text = page_text(page)
    spans = [found for found in re.finditer(r"(?<![\w.])\d\d\.\d\d(?![\w.])", claims.CODE.sub(claims._blank, text))]
    chosen = random.choice(spans)
    digit = str((int(chosen[0][-1]) + 5) % 10)
    other = text[: chosen.end() - 1] + digit + text[chosen.end() :]
    wrong = [claim for claim in claims.claims(page, other) if not claim.agrees]
    assert wrong or claims.unbound(page, other) or tables.written(other) != other
    line = text.count("\n") + 2
    for figure, words in (("7.31", "It is 7.31 times as fast."), ("47", "It takes 47 GB."), ("19", "19 % are lost.")):
        assert claims.unbound(page, f"{text}\n{words}\n") == [f"{page}:{line}: {figure}"]
