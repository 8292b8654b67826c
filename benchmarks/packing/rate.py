"""The rate term of rounded distillation: bytes of the packed int4 model against its perplexity, a row for each price.

    python -m benchmarks.packing.rate --out benchmarks/packing/rate.json

The dense built-in model is distilled as int4 in blocks of 32 leaves it (benchmarks/bits/models.py: 61k tokens, one
learning rate), with `refine.distill.rate` at each of `--rates`; everything else is the same. Packed: what
`soco-export pack` makes of model.onnx and its data; bits: what an entropy coder would need for a number of the layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.bits.models import LEARNING, tokenizer_of
from soco_export.checkpoint.layers import apply_factors
from soco_export.checkpoint.load import load_checkpoint
from soco_export.checkpoint.writer import save_checkpoint
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.evaluate.settings import CPU
from soco_export.export import export_onnx
from soco_export.files.atomic import write_atomic
from soco_export.files.pack import pack_folder
from soco_export.onnx.settings import ExportSettings
from soco_train import cut_factors, learn_scores, plan_ranks
from soco_train.data.corpus import load_blocks
from soco_train.numbers.rate import bits_per_weight
from soco_train.settings.data import DataSettings
from soco_train.settings.plan import PlanSettings
from soco_train.settings.refine import RefineSettings
from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.train import TrainSettings

TINY = Path(__file__).parents[2] / "soco_train" / "builtin" / "tiny"
ROUNDING = RoundingSettings(weights="int4", block=32)
FEW = 8  # blocks that the spectra are made of; at full size nothing is cut by them


@dataclass(frozen=True)
class Row:
    """One price; bytes: of model.onnx and its data; packed: the same for download, the tokenizer's files included."""

    rate: float
    perplexity: float
    loss: float
    bits: float
    bytes: int
    packed: int


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every price and write the JSON."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.packing.rate")
    parser.add_argument("--rates", type=float, nargs="+", default=[0, 0.01, 0.03, 0.1, 0.3])
    parser.add_argument("--steps", type=int, default=LEARNING.steps)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--blocks", type=int, default=64, help="of 256 tokens that perplexity is measured on")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    rows = []
    for rate in options.rates:
        with TemporaryDirectory() as work:
            rows.append(measure(rate, options, Path(work)))
        steps = ("steps", "lr", "blocks")
        document = {"settings": {key: getattr(options, key) for key in steps}, "rows": [asdict(row) for row in rows]}
        write_atomic(options.out, json.dumps(document, indent=1) + "\n")
        print(rows[-1], flush=True)


def measure(rate: float, options: argparse.Namespace, work: Path) -> Row:
    """Train at a price, export to int4, pack and score."""
    folder = _trained(rate, options, work)
    bits, numbers = 0.0, 0
    for name, weight in load_checkpoint(folder, dtype=torch.float32).named_parameters():
        if weight.dim() == 2 and name.endswith("_proj.weight"):
            bits, numbers = (
                bits + float(bits_per_weight(weight.detach(), ROUNDING)) * weight.numel(),
                numbers + weight.numel(),
            )
    out = export_onnx(folder, work / "onnx", ExportSettings(weights="int4", layouts=("optimum",))).folder
    pack_folder(out, work / "packed")
    found = measure_perplexity(OnnxDecoder(out, CPU, 1), _blocks("evaluation", options.blocks))
    size = sum(file.stat().st_size for file in out.glob("model.onnx*"))
    return Row(rate, found.value, found.loss, bits / numbers, size, (work / "packed").stat().st_size)


def _trained(rate: float, options: argparse.Namespace, work: Path) -> Path:
    change = {"rate": rate, "steps": options.steps, "lr": options.lr, "rounding": ROUNDING}
    distill = LEARNING.model_copy(update=change)
    text, plan = _blocks("calibration", None), PlanSettings(keep_params=1, allocation="lagrangian")
    model = load_checkpoint(TINY, dtype=torch.float32)
    train = TrainSettings(scorer="singular-values", basis="whitened")
    scores = learn_scores(model, text[:FEW], work / "spectra", train, plan)
    ranks = plan_ranks(scores, plan)
    apply_factors(model, cut_factors(model, text, scores, ranks, work / "cut", RefineSettings(distill=distill)))
    save_checkpoint(model, tokenizer_of(TINY), work / "hf")
    return work / "hf"


def _blocks(purpose: str, count: int | None) -> torch.Tensor:
    data = DataSettings(builtin="speeches", block=256, blocks=count)
    return load_blocks(tokenizer_of(TINY), data, purpose).tokens


if __name__ == "__main__":
    main()
