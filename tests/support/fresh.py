"""Random input that is new in every run of the tests and the same again when the run's seed is given.

The run's seed is SOCO_TEST_SEED, or drawn and then put there, so that workers and processes that a test starts have it
too. Every test and every fixture starts from a seed of its own, made of the run's and its name: alone or among all the
others, on whichever worker, it draws the same.
"""

from __future__ import annotations

import os
import random
import secrets
import sys
import zlib

import numpy as np

SEED = int(os.environ.setdefault("SOCO_TEST_SEED", str(secrets.randbelow(2**31))))


def seed_all(name: str) -> None:
    """Set the global generators of random, numpy and torch (where imported) by the run's seed and `name`."""
    seed = zlib.crc32(name.encode(), SEED)
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def rng() -> np.random.Generator:
    """Return a new generator, seeded from the state that `seed_all` set."""
    return np.random.default_rng(np.random.randint(2**31))


def examples(count: int) -> int:
    """Return how many inputs hypothesis tries where a quick run tries `count`: SOCO_FUZZ times as many."""
    return count * int(os.environ.get("SOCO_FUZZ", "1"))
