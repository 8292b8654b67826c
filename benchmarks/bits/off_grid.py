"""Move a model off the 4-bit grid that its weights came from, without changing what it computes.

    python -m benchmarks.bits.off_grid FOLDER OUT --evaluate wiki.test.raw

Weights that were read from a Q4_1 file are d · q + m with 16 values of q in each block of 32 inputs: what rounds onto
that grid loses nothing, what rounds onto another loses more than usual. Every matrix of the decoder has its input
channels multiplied by random e^N(0, spread), and what produces these channels is divided by the same numbers:

    norm γ / c  →  q, k, v · c        norm γ / c  →  gate, up · c        v / c  →  o · c        up / c  →  down · c

The function stays, its weights are spread as before but for that factor, and a block has no grid left.
OUT/off_grid.json says how many blocks were on one before and are after, how far the weights went in its steps, and the
perplexity of both.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from soco_train.data.corpus import load_blocks
from soco_train.modules.layers import select_linears
from soco_train.settings.data import DataSettings, LayerSettings

BLOCK, LEVELS = 32, 16
# Dequantised numbers are off their grid by a rounding of float32 or float16 at most.
CLOSE = 1e-3


def main(argv: Sequence[str] | None = None) -> None:
    """Rescale, save the folder and say what moved."""
    from soco_export.checkpoint.load import load_checkpoint
    from soco_export.checkpoint.writer import save_dense
    from soco_export.files.atomic import write_atomic

    options = parse(argv)
    model, tokenizer = load_checkpoint(options.folder, dtype=torch.float32), _tokenizer(options.folder)
    before = {name: linear.weight.detach().clone() for name, linear in select_linears(model, LayerSettings()).items()}
    perplexities = [_perplexity(model, tokenizer, options)]
    rescale(model, options.spread, torch.Generator().manual_seed(options.seed))
    perplexities.append(_perplexity(model, tokenizer, options))
    after = {name: linear.weight.detach() for name, linear in select_linears(model, LayerSettings()).items()}
    found = {
        "from": options.folder.name,
        "spread": options.spread,
        "seed": options.seed,
        "on_grid_before": on_grid(before.values()),
        "on_grid_after": on_grid(after.values()),
        "median_move_in_steps": float(torch.cat([moves(before[name], after[name]) for name in before]).median()),
        "evaluation": f"{options.blocks} windows of {options.block} tokens of {options.evaluate.name}",
        "perplexity_before_and_after": perplexities,
    }
    save_dense(model.eval(), tokenizer, options.out)
    text = json.dumps(found, indent=1) + "\n"
    write_atomic(options.out / "off_grid.json", text)
    print(text, end="")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bits.off_grid")
    parser.add_argument("folder", type=Path, help="a Hugging Face folder of the llama family, dense")
    parser.add_argument("out", type=Path)
    parser.add_argument("--evaluate", type=Path, required=True, help="text on which both must have one perplexity")
    parser.add_argument("--spread", type=float, default=0.25, help="standard deviation of a factor's logarithm")
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


@torch.no_grad()
def rescale(model: Any, spread: float, generator: torch.Generator) -> None:
    """Multiply the input channels of each matrix of the decoder by random factors, and divide their producers by them.

    model: of the llama family (grouped queries included), changed in place; exact but for rounding.
    """
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        readers = [attention.q_proj, attention.k_proj, attention.v_proj]
        _move(layer.input_layernorm, readers, _factors(layer.input_layernorm.weight, spread, generator))
        _move(
            layer.post_attention_layernorm,
            [mlp.gate_proj, mlp.up_proj],
            _factors(mlp.up_proj.weight[0], spread, generator),
        )
        _move(mlp.up_proj, [mlp.down_proj], _factors(mlp.down_proj.weight[0], spread, generator))
        values = _factors(attention.v_proj.weight[:, 0], spread, generator)
        heads = values.view(-1, 1, attention.head_dim)  # each value head is read by so many heads of queries
        repeated = heads.expand(-1, attention.num_key_value_groups, -1).reshape(-1)
        _move(attention.v_proj, [attention.o_proj], values, repeated)


def _factors(like: torch.Tensor, spread: float, generator: torch.Generator) -> torch.Tensor:
    return (spread * torch.randn(len(like), generator=generator)).exp()


def _move(producer: Any, readers: Iterable[Any], factors: torch.Tensor, read: torch.Tensor | None = None) -> None:
    """Divide the outputs of a norm or Linear by `factors` [n]; `read`: the same numbers as the readers have them."""
    for name, parameter in producer.named_parameters():
        parameter.div_(factors if name == "bias" or parameter.ndim == 1 else factors[:, None])
    for reader in readers:
        reader.weight.mul_(factors if read is None else read)


def on_grid(weights: Iterable[torch.Tensor]) -> float:
    """Return the share of blocks of 32 whose numbers are d · q + m with 16 values of q."""
    return float(torch.cat([_on_grid(weight) for weight in weights]).float().mean())


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


def moves(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Return each number's move in steps of the grid of 16 levels that `before` spans its block with; one in 17."""
    blocks = before.reshape(-1, BLOCK)
    step = ((blocks.amax(-1) - blocks.amin(-1)) / (LEVELS - 1)).clamp_min(1e-30)
    return ((after - before).reshape(-1, BLOCK).abs() / step[:, None]).flatten()[::17]


def _perplexity(model: Any, tokenizer: Any, options: argparse.Namespace) -> float:
    from soco_export.evaluate.perplexity import measure_perplexity
    from soco_export.runtimes.open import torch_decoder

    data = DataSettings(path=options.evaluate, block=options.block, blocks=options.blocks)
    blocks = load_blocks(tokenizer, data, "evaluation").tokens
    return measure_perplexity(torch_decoder(model, "torch"), blocks).value


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


if __name__ == "__main__":
    main()
