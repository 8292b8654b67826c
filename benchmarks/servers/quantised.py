"""int8 and int4 exports against PyTorch with weights rounded by the same rule: their perplexities agree within 2 %."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from soco_export.checkpoint.load import load_checkpoint
from soco_export.evaluate.decoders.decoder import TorchDecoder
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.perplexity import measure_perplexity
from soco_export.export import export_onnx
from soco_export.onnx.settings import ExportSettings, QuantizeSettings
from soco_train.data.corpus import load_blocks
from soco_train.forms.base import FactoredLinear
from soco_train.numbers.blocks import Grid, nearest
from soco_train.settings.data import DataSettings
from soco_train.settings.rounding import BITS, WeightType

TOLERANCE = 0.02


@dataclass(frozen=True)
class Comparison:
    """Perplexity on the same blocks: of PyTorch in fp32, of PyTorch with rounded weights, of the export."""

    weights: str
    plain: float
    rounded: float
    exported: float

    @property
    def ratio(self) -> float:
        """Export / rounded PyTorch."""
        return self.exported / self.rounded


def compare(run: Path, weights: WeightType, scratch: Path, blocks: int) -> Comparison:
    """Export the run's checkpoint with `weights` into `scratch`, and measure on the built-in evaluation text."""
    settings = ExportSettings(weights=weights)
    export_onnx(run / "hf", scratch / weights, settings)
    data = DataSettings(builtin="speeches", block=256, blocks=blocks)
    tokens = load_blocks(AutoTokenizer.from_pretrained(run / "hf"), data, "evaluation").tokens.numpy()
    model = load_checkpoint(run / "hf").float()
    plain = measure_perplexity(TorchDecoder(model), tokens).value
    round_weights(model, BITS[weights], settings.quantize)
    rounded = measure_perplexity(TorchDecoder(model), tokens).value
    exported = measure_perplexity(OnnxDecoder(scratch / weights), tokens).value
    return Comparison(weights, plain, rounded, exported)


@torch.no_grad()
def round_weights(model: Any, bits: int, how: QuantizeSettings) -> None:
    """Round every stored matrix of the low-rank model in place, the token table by its own rule; a tied head follows.

    A graph that reorders a matrix's inputs cuts other blocks: equal in kind, not to the bit.
    """
    table = model.get_input_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear | FactoredLinear) and module.weight is not table.weight:
            _round(module.weight, bits, how.block, how.symmetric)
    if how.embedding != "same":
        _round(table.weight, BITS[how.embedding], how.block, symmetric=True)


def _round(weight: torch.Tensor, bits: int, block: int, symmetric: bool) -> None:
    weight.copy_(nearest(weight, Grid(bits, block, symmetric)).values())
