"""Sparse codes over a dictionary beside stacked and pivoted factors, in closed form at equal bytes.

Run from the root of the repository: python -m benchmarks.sparse_codes --out benchmarks/results/sparse-codes.json

    least ‖(W - C D) L‖,    D [k, n] = Q L⁻¹ with orthonormal rows of Q,  C [m, k] with s = k/2 numbers in each row

L Lᵀ is the covariance of the layer's inputs. In turns: C holds the s largest of each row of W L Qᵀ, Q is the polar
factor of Cᵀ W L (Procrustes). Source: COMPOT (arXiv 2602.15200), the modern form of DSFormer (arXiv 2312.13211). A mask
of one bit for each place of C is counted. Every way is uniform over the layers of the built-in model, not trained, and
written back as dense weights: ONNX Runtime has no form of it (`storage: sparse` is refused).
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.model.load import load_model, load_tokenizer
from soco_export.recipe.load import load_recipe
from soco_export.runtimes.open import torch_decoder
from soco_train import method
from soco_train.data.corpus import load_blocks
from soco_train.forms.pivoted import PivotedFactors
from soco_train.forms.registry import rank_at
from soco_train.forms.stacked import StackedFactors
from soco_train.numbers.rounding import rounded
from soco_train.settings.rounding import RoundingSettings
from soco_train.spectra.bases import Roots, present
from soco_train.spectra.statistics import collect_statistics

BITS = {"float16": 16.0, "int4": 4.5}  # of a stored number; int4: with a float16 scale for each 32
INT4 = RoundingSettings(weights="int4")
TURNS = 20  # published


def sparse_codes(weight: torch.Tensor, root: torch.Tensor, atoms: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return C [m, atoms] with atoms/2 numbers a row, and D [atoms, n]; weight: [m, n], root: L [n, n], float64."""
    wanted = weight @ root
    directions = torch.linalg.svd(wanted, full_matrices=True)[2][:atoms]
    for _ in range(TURNS):
        left, _, right = torch.linalg.svd(largest(wanted @ directions.T, atoms // 2).T @ wanted, full_matrices=False)
        directions = left @ right
    codes = largest(wanted @ directions.T, atoms // 2)
    return codes, torch.linalg.solve_triangular(root, directions, upper=False, left=False)


def largest(codes: torch.Tensor, each: int) -> torch.Tensor:
    """Return the matrix with all but the `each` largest of every row 0."""
    places = codes.abs().topk(each, dim=1).indices
    return torch.zeros_like(codes).scatter_(1, places, codes.gather(1, places))


def atoms_at(share: float, m: int, n: int, bits: float) -> int:
    """Return how many atoms, an even number of at most n, cost no more than `share` of m n numbers of `bits`."""
    each = bits * (n + m / 2) + m  # a row of D, half a column of C, a column of the mask
    return min(int(share * m * n * bits / each), n) // 2 * 2


def low_rank(weight: torch.Tensor, root: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best factors [m, rank], [rank, n] in the same norm (SVD-LLM)."""
    u, sigma, v = torch.linalg.svd(weight @ root, full_matrices=False)
    down = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
    scale = (down.norm(dim=1) * sigma[:rank]).sqrt()  # so that both factors round alike
    return u[:, :rank] * scale, down * (sigma[:rank] / scale)[:, None]


Pair = tuple[torch.Tensor, torch.Tensor]
Way = Callable[[torch.Tensor, torch.Tensor, float, float], Pair]  # weight, root, share, bits of a number


def stacked(weight: torch.Tensor, root: torch.Tensor, share: float, bits: float) -> Pair:
    return low_rank(weight, root, math.floor(rank_at(StackedFactors, share, *weight.shape)))


def pivoted(weight: torch.Tensor, root: torch.Tensor, share: float, bits: float) -> Pair:
    return low_rank(weight, root, math.floor(rank_at(PivotedFactors, share, *weight.shape)))


def coded(weight: torch.Tensor, root: torch.Tensor, share: float, bits: float) -> Pair:
    return sparse_codes(weight, root, atoms_at(share, *weight.shape, bits))


WAYS: Mapping[str, tuple[Way, tuple[str, ...]]] = {
    "stacked": (stacked, ("float16", "int4")),
    "sparse-codes": (coded, ("float16", "int4")),
    "pivoted": (pivoted, ("float16",)),  # does not bear int4
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.8, 0.6])
    parser.add_argument("--types", nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    command = f"python -m benchmarks.sparse_codes --sizes {' '.join(map(str, given.sizes))}"
    command += f" --types {' '.join(given.types)}" + "".join(f" --set {setting}" for setting in given.settings)
    document = {"command": command, "rows": measure(given.settings, given.sizes, given.types)}
    given.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def measure(settings: list[str], sizes: list[float], wanted: list[str]) -> list[dict[str, Any]]:
    """Return a row for each way, type and size: perplexity, and its ratio to the dense model's."""
    recipe = load_recipe("tiny", settings)
    model, tokenizer = load_model(recipe)[0], load_tokenizer(recipe)
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens[: recipe.train.statistics_blocks]
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens
    with tempfile.TemporaryDirectory() as folder:
        linears = method.open_subject(model, recipe.layers, calibration, Path(folder)).linears
    statistics = collect_statistics(model, linears, calibration, frozenset({"input_covariance"}))
    roots = Roots(recipe.train.ridge)
    known = {
        name: (linear, linear.weight.detach().double(), roots(present(statistics[name].input_covariance)))
        for name, linear in linears.items()
    }

    def perplexity() -> float:
        return measure_perplexity(torch_decoder(model, "dense"), evaluation).value

    dense, rows = perplexity(), []
    for size in sizes:
        for way, (make, types) in WAYS.items():
            for kind in [kind for kind in types if kind in wanted]:
                for linear, weight, root in known.values():
                    linear.weight = nn.Parameter(product(make(weight, root, size, BITS[kind]), kind))
                value = perplexity()
                texts = {"evaluation": {"mean": value, "ratio": value / dense}}
                rows.append({"method": f"{way} {kind}", "keep": size, "texts": texts})
                print(rows[-1], flush=True)
    return rows


def product(pair: Pair, kind: str) -> torch.Tensor:
    """Return the dense weight that stored factors make, in fp32."""
    first, second = (part.half().float() if kind == "float16" else as_stored(part) for part in pair)
    return first @ second


def as_stored(part: torch.Tensor) -> torch.Tensor:
    """Return a factor as int4 leaves it: what a row stores is rounded block by block, without the zeros of its mask."""
    stored = part != 0
    found = torch.zeros(part.shape)
    found[stored] = rounded(part[stored].reshape(len(part), -1).float(), INT4).flatten()
    return found


if __name__ == "__main__":
    main()
