"""Move a model off the 4-bit grid that its weights came from: some steps of ordinary training.

    python -m benchmarks.bits.off_grid FOLDER OUT --texts wiki.train.raw c4.jsonl --steps 300

Weights that were read from a Q4_1 file are d · q + m with 16 values of q in each block of 32: what rounds onto that
grid loses nothing, what rounds onto another loses more than usual. The next token is learnt with AdamW, all weights
taking part. OUT/off_grid.json says how many blocks were on such a grid before and are after, and how far the weights
went in steps of it; below a third of a step what was measured is still mostly of that grid.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from soco_train.data.corpus import load_blocks
from soco_train.learn.optimiser import warmup_cosine
from soco_train.modules.layers import select_linears
from soco_train.settings import DataSettings, LayerSettings

BLOCK, LEVELS = 32, 16
# Dequantised numbers are off their grid by a rounding of float32 or float16 at most.
CLOSE = 1e-3


def main(argv: Sequence[str] | None = None) -> None:
    """Train, save the folder and say what moved."""
    from soco_export.checkpoint.load import load_checkpoint
    from soco_export.checkpoint.writer import save_dense

    options = parse(argv)
    torch.manual_seed(options.seed)
    model, tokenizer = load_checkpoint(options.folder, dtype=torch.float32), _tokenizer(options.folder)
    blocks = load_blocks(tokenizer, DataSettings(path=tuple(options.texts), block=options.block), "calibration")
    before = {name: linear.weight.detach().clone() for name, linear in select_linears(model, LayerSettings()).items()}
    started, losses = time.monotonic(), list(train(model, blocks.tokens, options))
    moved = [_moved(before[name], linear.weight.detach()) for name, linear in _linears(model)]
    found = {
        "from": options.folder.name,
        "calibration": [text.name for text in options.texts],
        "steps": options.steps,
        "tokens": options.steps * options.batch * options.block,
        "lr": options.lr,
        "seed": options.seed,
        "on_grid_before": on_grid(before.values()),
        "on_grid_after": on_grid(linear.weight.detach() for _, linear in _linears(model)),
        "median_move_in_steps": float(torch.tensor(moved).median()),
        "loss_first_20": sum(losses[:20]) / len(losses[:20]),
        "loss_last_20": sum(losses[-20:]) / len(losses[-20:]),
        "seconds": round(time.monotonic() - started),
    }
    save_dense(model.eval(), tokenizer, options.out)
    (options.out / "off_grid.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits.off_grid")
    parser.add_argument("folder", type=Path, help="a Hugging Face folder, dense")
    parser.add_argument("out", type=Path)
    parser.add_argument("--texts", nargs="+", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=1, help="blocks a step")
    parser.add_argument("--block", type=int, default=256)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def train(model: nn.Module, tokens: torch.Tensor, options: argparse.Namespace) -> Iterator[float]:
    """Yield the loss of each step."""
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.lr, weight_decay=0.0)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(options.seed))
    for step in range(options.steps):
        chosen = torch.arange(step * options.batch, (step + 1) * options.batch) % len(order)
        batch = tokens[order[chosen]]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = options.lr * warmup_cosine(step, options.steps, 0.05)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield float(loss.detach())


def on_grid(weights: Any) -> float:
    """Return the share of blocks of 32 whose numbers are d · q + m with 16 values of q."""
    found = [_on_grid(weight) for weight in weights]
    return float(torch.cat(found).float().mean())


def _on_grid(weight: torch.Tensor) -> torch.Tensor:
    """weight: [m, n] → bool, one a block: the smallest gap between sorted numbers divides the range into ≤ 15 steps."""
    blocks = weight.double().reshape(-1, BLOCK)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    span = (high - low).clamp_min(1e-30)
    fits = torch.zeros(len(blocks), dtype=torch.bool)
    for steps in range(1, LEVELS):
        place = (blocks - low) / span * steps
        fits |= (place - place.round()).abs().amax(-1) < steps * CLOSE
    return fits


def _moved(before: torch.Tensor, after: torch.Tensor) -> float:
    """Return the root mean square move in steps of the grid of 16 levels that `before` spans a block with."""
    blocks = before.reshape(-1, BLOCK)
    step = (blocks.amax(-1) - blocks.amin(-1)) / (LEVELS - 1)
    move = (after - before).reshape(-1, BLOCK).square().mean(-1).sqrt()
    return float((move / step.clamp_min(1e-30)).median())


def _linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    return list(select_linears(model, LayerSettings()).items())


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
