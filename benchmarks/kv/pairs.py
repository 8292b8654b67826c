"""Perplexity with fewer rotary pairs in queries and keys: what a smaller key cache would cost.

    python -m benchmarks.kv.pairs --out benchmarks/kv/pairs.json

Scores take a query and a key pair by pair, so a pair that neither has need not be cached; nothing takes over what it
said. Pairs go by the least `energy` E‖q‖² E‖k‖², or by the least `fisher`: the mean square, over the calibration text,
of what the loss says of a pair's part in the scores of a query. `alike`: the same pairs in all heads of a layer, which
is what a rotation as an operator can do; `apart`: each key head its own, which it cannot. `distilled`: fisher, alike,
and both projections then trained as the recipe's refine.distill says.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.kv.__main__ import perplexity, trained
from soco_export.model.load import load_model
from soco_export.recipe.load import load_recipe
from soco_train.data.corpus import load_blocks
from soco_train.forms.base import LayerFactors
from soco_train.forms.heads import HeadRows

WAYS = ("energy, alike", "energy, apart", "fisher, alike", "fisher, apart")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="tiny", help="a recipe of a Llama, whose heads turn as a whole")
    parser.add_argument("--set", dest="settings", action="append", default=[], help="a recipe key")
    parser.add_argument("--keep", nargs="+", type=float, default=[0.875, 0.75, 0.5])
    parser.add_argument("--blocks", type=int, default=16, help="of calibration text, for the scores")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.model, arguments.settings)
    model, tokenizer = load_model(recipe)
    model.float().eval()
    calibration = load_blocks(tokenizer, recipe.data, "calibration").tokens
    evaluation = load_blocks(tokenizer, recipe.evaluation, "evaluation").tokens
    found: dict[str, Any] = {"command": f"python -m benchmarks.kv.pairs {' '.join(sys.argv[1:])}"}
    found |= {"dense": perplexity(model, evaluation), "rows": []}
    scores = scored(model, calibration[: arguments.blocks])
    for keep in arguments.keep:
        row: dict[str, Any] = {"keep": keep}
        for way in WAYS:
            kept = chosen(scores[way.split(",")[0]], keep, alike=way.endswith("alike"))
            with without(model, kept):
                row[way] = perplexity(model, evaluation)
        if recipe.refine.distill.steps:
            narrowed = rows_of(model, chosen(scores["fisher"], keep, alike=True))
            row["distilled"] = trained(model, narrowed, evaluation, recipe, calibration)
        print(row, flush=True)
        found["rows"].append(row)
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def attentions(model: Any) -> list[Any]:
    return [layer.self_attn for layer in model.model.layers]


def scored(model: Any, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return both scores of every pair, [layers, key heads, pairs], over the text `tokens` [n, t]."""
    config, size = model.config, attentions(model)[0].head_dim
    shape = (config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads, 2, size // 2)
    sums = {kind: torch.zeros(len(attentions(model)), shape[0], size // 2) for kind in ("query", "key", "fisher")}
    outputs: dict[tuple[int, str], torch.Tensor] = {}

    def keep(place: tuple[int, str]) -> Any:
        def hook(module: nn.Module, inputs: Any, y: torch.Tensor) -> None:
            y.retain_grad()
            outputs[place] = y

        return hook

    handles = [
        getattr(attention, f"{name}_proj").register_forward_hook(keep((index, name)))
        for index, attention in enumerate(attentions(model))
        for name in "qk"
    ]
    for block in tokens:
        loss = model(input_ids=block[None], labels=block[None], use_cache=False).loss * (len(block) - 1)
        model.zero_grad()
        loss.backward()
        for index in range(len(attentions(model))):
            query, key = outputs[index, "q"], outputs[index, "k"]
            assert query.grad is not None
            by_query = (query.grad * query.detach()).reshape(-1, *shape).sum(3).square()
            sums["fisher"][index] += by_query.sum((0, 2))
            sums["query"][index] += query.detach().reshape(-1, *shape).square().sum((0, 2, 3))
            sums["key"][index] += key.detach().reshape(-1, shape[0], 2, size // 2).square().sum((0, 2))
    for handle in handles:
        handle.remove()
    model.zero_grad()
    return {"energy": sums["query"] * sums["key"], "fisher": sums["fisher"]}


def chosen(scores: torch.Tensor, keep: float, alike: bool) -> torch.Tensor:
    """Return which pairs stay, bool [layers, key heads, pairs]: the same share in every layer."""
    if alike:
        scores = scores.sum(1, keepdim=True).expand_as(scores)
    best = scores.topk(round(keep * scores.shape[-1]), -1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, best, True)


@contextmanager
def without(model: Any, kept: torch.Tensor) -> Iterator[None]:
    """Within this context keys have no other pairs than those `kept`."""
    weights = [attention.k_proj.weight for attention in attentions(model)]
    whole = [weight.detach().clone() for weight in weights]
    for weight, pairs in zip(weights, kept, strict=True):
        weight.data *= pairs.repeat(1, 2).flatten()[:, None]
    try:
        yield
    finally:
        for weight, before in zip(weights, whole, strict=True):
            weight.data = before


def rows_of(model: Any, kept: torch.Tensor) -> Mapping[str, LayerFactors]:
    """Return query and key projections without the rows of other pairs than those `kept`, alike in all heads."""
    found: dict[str, LayerFactors] = {}
    for index, pairs in enumerate(kept[:, 0]):
        stays = pairs.repeat(2)
        for name in "qk":
            weight = getattr(attentions(model)[index], f"{name}_proj").weight.detach()
            of_heads = stays.repeat(len(weight) // len(stays))
            order = torch.cat([of_heads.nonzero().flatten(), (~of_heads).nonzero().flatten()])
            found[f"model.layers.{index}.self_attn.{name}_proj"] = HeadRows(weight[of_heads], order, None)
    return found


if __name__ == "__main__":
    main()
