"""What a recipe may say under `export`."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Literal

from pydantic import Field

from soco_train.settings import Section

Flavour = Literal["standard", "contrib"]
FloatType = Literal["float32", "float16", "bfloat16"]
WeightType = Literal["same", "int8", "int4", "int2"]
TableType = Literal["same", "int8", "int4"]


class QuantizeSettings(Section):
    """How `export.weights: int8|int4|int2` are made: one scale per `block` weights along a row's input.

    `rule` is how levels are chosen: `nearest`, or `calibrated` for what each layer reads in `calibration_tokens` tokens
    of the calibration text (soco_train/numbers/rules.py).
    `embedding` is the type of the token table, always symmetric; a tied head shares it (int8 beside int4 weights: fewer
    bytes and a better model than an int4 copy).
    `accuracy_level` is MatMulNBits' own: 4 lets the CPU round activations to int8 per block (fast), 1 keeps them fp32.
    `keep` are globs of layers that stay unquantised (`lm_head`, `*.down_proj`, `*embed_tokens`).
    """

    block: Literal[16, 32, 64, 128, 256] = 32
    symmetric: bool = True
    rule: str = "nearest"
    calibration_tokens: int = Field(default=16384, ge=1)
    embedding: TableType = "int8"
    accuracy_level: int = Field(default=4, ge=0, le=4)
    keep: tuple[str, ...] = ()


class ExportSettings(Section):
    """One ONNX folder.

    `flavour`: `standard` uses ONNX's own operators and takes left-padded batches; `contrib` uses ONNX Runtime's
    (GroupQueryAttention) for a shared key/value buffer, one sequence or right padding. `dtype`: type of activations,
    cache and unquantised weights; logits are always float32. `weights`: int8, int4 or int2 blocks for every MatMul.
    `last_token_logits`: logits of the last slot only (not for right-padded prompts). `pack`: layers that read the same
    input share one MatMul. `layouts`: what to write beside the model, by name (soco_export/runtimes/).
    """

    flavour: Flavour = "standard"
    dtype: FloatType = "float32"
    weights: WeightType = "same"
    quantize: QuantizeSettings = QuantizeSettings()
    last_token_logits: bool = False
    pack: bool = False
    layouts: tuple[str, ...] = ("optimum", "genai")

    def quantizes(self, name: str) -> bool:
        """Whether the matrices of the layer `name` are stored in blocks."""
        return self.weights != "same" and not any(fnmatchcase(name, glob) for glob in self.quantize.keep)

    @property
    def calibrates(self) -> bool:
        """Whether a text is needed to round the weights; RecipeError for a rule that nobody knows."""
        from soco_train.numbers.rules import find_rounding

        return find_rounding(self.quantize.rule).calibrates and self.weights != "same"
