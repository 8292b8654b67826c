"""What a plan reads of scores without torch is what torch reads; and what one refuses the other refuses as it does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from soco_train.errors import DataError
from soco_train.plan.ranks import plan_ranks
from soco_train.settings.plan import PlanSettings
from soco_train.store.importances import Importances
from soco_train.store.scores import LayerScores, Scores
from tests.support.fresh import examples, rng

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def drawn_layer(dtype: torch.dtype) -> LayerScores:
    """Return random scores of a layer of random shape, with some of all that a layer may have."""
    random = rng()
    m, n, r = (int(size) for size in random.integers(6, 13, 3))
    k = min(m, n)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(dtype)

    parts: dict[str, Any] = {
        "deviation": numbers(m),
        "correction": (numbers(k, r), numbers(r, n)),
        "adapter": (numbers(m, r), numbers(r, n)),
        "components": (numbers(m, k), numbers(k, n)),
    }
    there = {part: found if random.random() < 0.5 else None for part, found in parts.items()}
    return LayerScores(numbers(k), numbers(k), there.pop("deviation"), (m, n), **there)


def drawn_scores(dtype: torch.dtype, layers: int = 4) -> Scores:
    return Scores({f"layer.{i}": drawn_layer(dtype) for i in range(layers)}, {"parameters": 7, "train": {"seed": 1}})


def same(one: Importances, other: Importances) -> bool:
    pairs = zip(one.layers.values(), other.layers.values(), strict=True)
    return (list(one.layers), one.provenance) == (list(other.layers), other.provenance) and all(
        (a.shape, a.deviates, a.importance.dtype) == (b.shape, b.deviates, b.importance.dtype)
        and np.array_equal(a.importance, b.importance)
        for a, b in pairs
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_they_are_those_of_the_scores(dtype: torch.dtype, tmp_path: Path) -> None:
    scores, path = drawn_scores(dtype), tmp_path / "scores.safetensors"
    scores.save(path)
    found = Importances.load(path)
    assert same(found, scores.importances())
    assert same(found, Scores.load(path).importances())
    assert all(layer.importance.dtype == np.float64 for layer in found.layers.values())
    wanted = PlanSettings(keep_params=0.8)
    assert plan_ranks(found, wanted).to_json() == plan_ranks(scores, wanted).to_json()


def answer(load: Callable[[Path], Importances], path: Path) -> Importances | tuple[str, str, str]:
    """Return the importances, or all that the refusal says."""
    try:
        return load(path)
    except DataError as error:
        return error.message, error.fix, error.where


def test_both_readers_refuse_the_same_files_in_the_same_words(tmp_path: Path) -> None:
    """Files that were cut off, or of which a few bytes were changed."""
    path, random, refusals = tmp_path / "scores.safetensors", rng(), 0
    for _ in range(examples(100)):
        drawn_scores(torch.float32, layers=2).save(path)
        data = bytearray(path.read_bytes())
        at = int(random.integers(len(data)))
        data[at : at + int(random.integers(1, 4))] = random.bytes(int(random.integers(0, 4)))
        path.write_bytes(data[:at] if random.random() < 0.2 else data)
        light, whole = answer(Importances.load, path), answer(lambda file: Scores.load(file).importances(), path)
        refusals += isinstance(whole, tuple)
        assert light == whole if isinstance(light, tuple) or isinstance(whole, tuple) else same(light, whole)
    assert refusals


def test_numbers_that_only_one_reader_knows_are_refused(tmp_path: Path) -> None:
    header = '{"kind": "scores", "shapes": {"a": [2, 3]}, "provenance": {}}'
    numbers = {"a:importance": torch.ones(2), "a:scale": torch.ones(2).to(torch.float8_e4m3fn)}
    save_file(numbers, tmp_path / "scores.safetensors", {"header": header})
    with pytest.raises(DataError, match="a:scale is of the type F8_E4M3"):
        Importances.load(tmp_path / "scores.safetensors")
