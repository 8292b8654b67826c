"""Arithmetic items, made up: what a compressed model is often first to forget, and no text's perplexity shows.

    python -m soco_export.evaluate.arithmetic 200 > arithmetic.jsonl
    soco-export validate RUN --set 'validate.tasks=[{path: arithmetic.jsonl}]'

Three solved examples stand before each; the wrong choices are near misses, so that chance is a quarter.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from typing import Any

_SHOTS = "3 + 4 = 7\n9 - 5 = 4\n6 * 7 = 42\n"
MISSES = (-10, -2, -1, 1, 2, 10)


def arithmetic(count: int, seed: int = 0) -> Iterator[dict[str, Any]]:
    """Yield sums, differences of two digits and products of one, as the fields of a task item; none below 0."""
    draw = random.Random(seed)
    for _ in range(count):
        sign = draw.choice("+-*")
        least, most = (2, 9) if sign == "*" else (10, 99)
        two, one = sorted((draw.randint(least, most), draw.randint(least, most)))
        value = {"+": one + two, "-": one - two, "*": one * two}[sign]
        choices = [value, *draw.sample([value + miss for miss in MISSES if value + miss >= 0], 3)]
        draw.shuffle(choices)
        texts = [f" {choice}" for choice in choices]
        yield {"context": f"{_SHOTS}{one} {sign} {two} =", "choices": texts, "label": choices.index(value)}


if __name__ == "__main__":
    for item in arithmetic(int(sys.argv[1])):
        sys.stdout.write(json.dumps(item) + "\n")
