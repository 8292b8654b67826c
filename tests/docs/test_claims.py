import random

import pytest

from tools import claims


@pytest.mark.parametrize("page", claims.PAGES)
def test_bound_figures_are_those_that_were_measured(page):
    found = list(claims.claims(page, (claims.ROOT / page).read_text(encoding="utf-8")))
    assert [claim for claim in found if not claim.agrees] == []
    assert len(found) >= {"README.md": 8, "docs/benchmarks.md": 120, "docs/relatives.md": 8}[page]


def test_a_figure_that_was_changed_is_found():
    page = "docs/benchmarks.md"
    text = (claims.ROOT / page).read_text(encoding="utf-8")
    table = random.choice(claims.MARKER.findall(text))[2]
    figure = random.choice([c.shown for c in claims.claims(page, text) if f" {c.shown} " in table])
    digit = str((int(figure[-1]) + 5) % 10)
    other = text.replace(table, table.replace(f" {figure} ", f" {figure[:-1]}{digit} "))
    assert any(not claim.agrees for claim in claims.claims(page, other))
