"""Block quantisation: the types of weights there are, and what the factors are trained for."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from soco_train.settings.section import Section

BITS = {"int8": 8, "int4": 4, "int2": 2}  # of a number that block quantisation leaves
Block = Literal[16, 32, 64, 128, 256]
BLOCKS: tuple[Block, ...] = get_args(Block)  # inputs that can share a scale
WeightType = Literal["same", "int8", "int4", "int2"]
TYPES: tuple[WeightType, ...] = get_args(WeightType)
TABLE_TYPES: tuple[WeightType, ...] = ("same", "int8", "int4")  # that ONNX Runtime looks tokens up in


class RoundingSettings(Section):
    """Block quantisation that the factors are in for, in the words of `export.weights` and `export.quantize`.

    `weights: planned` is what the plan for `keep_bytes` chose for each layer; `each` and `blocks` are then its types
    and blocks by name. `rule`: one of soco_train/numbers/rules.py that looks at the weights alone.
    """

    weights: Literal[WeightType, "planned"] = "same"
    each: dict[str, WeightType] = Field(default_factory=dict)
    block: Block = 32
    blocks: dict[str, int] = Field(default_factory=dict)
    symmetric: bool = True
    rule: str = "nearest"
    keep: tuple[str, ...] = ()
    dense: bool = Field(default=True, description="layers that stay dense are trained as rounded too")
