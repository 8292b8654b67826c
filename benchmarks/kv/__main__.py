"""Perplexity and cache bytes a token with values of fewer numbers (refine.values) on a Llama.

    python -m benchmarks.kv --out benchmarks/kv/results.json

Three ways to r numbers a value head, closed form: `absorbed` (B for what o_proj's inputs and the output curvature say,
o_proj refitted: what refine.values does), `svd, refitted` (B of the SVD of v_proj, o_proj refitted), `svd` (the same,
o_proj projected alone); these rows fold B into a whole o_proj, which gives the same outputs. `distilled`: absorbed,
and both projections then trained as the recipe's refine.distill says. Cache bytes are those of the exported graph,
float32; `step_bytes`: weights and cache that a decode step reads, after 128 tokens and after as many as the context
holds. Speed: benchmarks.kv.speed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from soco_export.bench.roofline import bytes_per_decode_step
from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.export import export_onnx
from soco_export.files.names import MODEL_FILE
from soco_export.model.load import load_model
from soco_export.onnx.inspect import cache_bytes
from soco_export.onnx.settings import ExportSettings
from soco_export.recipe.load import load_recipe
from soco_export.recipe.recipe import Recipe
from soco_train.data.corpus import load_blocks
from soco_train.events import silent
from soco_train.forms.base import LayerFactors
from soco_train.modules.subject import Session, Subject
from soco_train.modules.values import value_sites
from soco_train.refine.absorb import absorb, value_projections
from soco_train.refine.distill import distill
from soco_train.refine.values import narrow_values
from soco_train.settings.refine import ValueSettings
from soco_train.spectra.statistics import LayerStatistics, collect_statistics

NEEDS = frozenset({"input_covariance", "output_curvature"})
Fold = Callable[[nn.Module, LayerStatistics, int, int, int], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="a recipe")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--blocks", type=int, default=64, help="of calibration text")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.model)
    model, tokenizer = load_model(recipe)
    model.float().eval()
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens[: arguments.blocks]
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens
    attentions = [layer.self_attn for layer in model.model.layers]
    projections = {str(index): attention.o_proj for index, attention in enumerate(attentions)}
    statistics = collect_statistics(model, projections, calibration, NEEDS)
    dense = {name: layer.weight.detach().clone() for name, layer in projections.items()}
    groups, size = model.config.num_key_value_heads, attentions[0].head_dim
    found: dict[str, object] = {"command": f"python -m benchmarks.kv {' '.join(sys.argv[1:])}"}
    rows: list[dict[str, object]] = []
    found |= {"calibration_tokens": calibration.numel(), "dense": perplexity(model, evaluation)}
    kept = tempfile.TemporaryDirectory()
    work = Path(kept.name)
    export(model, tokenizer, work / "dense")
    found |= {"dense_cache_bytes_a_token": cache_bytes(work / "dense")}
    found |= {"dense_step_bytes": step_bytes(work / "dense", model.config), "rows": rows}
    for keep in arguments.keep:
        rank = round(keep * size)
        row: dict[str, object] = {
            "keep_values": keep,
            "rank": rank,
        }
        for name, fold in WAYS.items():
            for index, attention in enumerate(attentions):
                attention.o_proj.weight.data = fold(attention, statistics[str(index)], groups, size, rank).float()
            row[name] = perplexity(model, evaluation)
            for index, attention in enumerate(attentions):
                attention.o_proj.weight.data = dense[str(index)].clone()
        narrowed = narrow(model, calibration, keep)
        row |= {"distilled": trained(model, narrowed, evaluation, recipe, calibration)}
        small = copy.deepcopy(model)
        apply_factors(small, narrowed)
        export(small, tokenizer, work / f"{keep}")
        row |= {"cache_bytes_a_token": cache_bytes(work / f"{keep}")}
        row |= {"step_bytes": step_bytes(work / f"{keep}", model.config)}
        print(row, flush=True)
        rows.append(row)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def narrow(model: nn.Module, tokens: torch.Tensor, keep: float) -> Mapping[str, LayerFactors]:
    return narrow_values(model, value_sites(model), tokens, ValueSettings(keep=keep), silent)


def trained(
    model: nn.Module,
    narrowed: Mapping[str, LayerFactors],
    evaluation: torch.Tensor,
    recipe: Recipe,
    tokens: torch.Tensor,
) -> float:
    with tempfile.TemporaryDirectory() as work:
        subject = Subject(model, {}, {}, tokens)
        done = distill(subject, narrowed, recipe.refine.distill, Session(Path(work)))
    other = copy.deepcopy(model)
    apply_factors(other, done)
    return perplexity(other, evaluation)


def export(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    save_checkpoint(model, tokenizer, folder.with_suffix(".hf"))
    export_onnx(folder.with_suffix(".hf"), folder, ExportSettings(layouts=("ort",)))


def step_bytes(folder: Path, config: Any) -> dict[str, int]:
    """Return what a decode step reads, weights and cache, after 128 tokens and after as many as the context holds."""
    lengths = (128, config.max_position_embeddings - 1)
    return {str(past): bytes_per_decode_step(folder / MODEL_FILE, past) for past in lengths}


@torch.no_grad()
def perplexity(model: nn.Module, tokens: torch.Tensor) -> float:
    losses = [cross_entropy(model(block[None]).logits[0, :-1], block[1:], reduction="sum").item() for block in tokens]
    return math.exp(sum(losses) / (len(tokens) * (tokens.shape[1] - 1)))


def absorbed(attention: nn.Module, known: LayerStatistics, groups: int, size: int, rank: int) -> torch.Tensor:
    weight, statistics = attention.o_proj.weight.detach(), (known.input_covariance, known.output_curvature)
    return absorb(weight, *statistics, value_projections(weight, *statistics, groups, size, rank)).folded()


def leading_values(attention: nn.Module, groups: int, size: int, rank: int) -> torch.Tensor:
    """Return the leading left singular vectors of each group's v_proj, as B [groups, rank, size]."""
    weight = attention.v_proj.weight.detach().double().reshape(groups, size, -1)
    return torch.linalg.svd(weight, full_matrices=False).U[:, :, :rank].mT


def svd_refitted(attention: nn.Module, known: LayerStatistics, groups: int, size: int, rank: int) -> torch.Tensor:
    down = leading_values(attention, groups, size, rank)
    return absorb(attention.o_proj.weight.detach(), known.input_covariance, known.output_curvature, down).folded()


def svd(attention: nn.Module, known: LayerStatistics, groups: int, size: int, rank: int) -> torch.Tensor:
    down = leading_values(attention, groups, size, rank)
    weight = attention.o_proj.weight.detach().double()
    each = (down.mT @ down).repeat_interleave(weight.shape[1] // size // groups, 0)
    return weight @ torch.block_diag(*each)


WAYS: Mapping[str, Fold] = {"absorbed": absorbed, "svd, refitted": svd_refitted, "svd": svd}

if __name__ == "__main__":
    main()
