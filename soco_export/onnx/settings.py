"""What a recipe may say under `export`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from pydantic import Field

from soco_train.errors import RecipeError
from soco_train.settings.rounding import BITS, TABLE_TYPES, Block, WeightType
from soco_train.settings.section import Section

if TYPE_CHECKING:
    from soco_train.numbers.blocks import Grid
    from soco_train.numbers.rules import Rounding

Flavour = Literal["standard", "contrib"]
FloatType = Literal["float32", "float16", "bfloat16"]
TableType = Literal["same", "int8", "int4"]
CacheType = Literal["same", "int8", "int4"]
Value = TypeVar("Value")


def named(values: Mapping[str, Value], name: str) -> Value | None:
    """Return the value of a layer by its name, or that of the first glob which it matches, or None."""
    return values.get(name) or next((value for glob, value in values.items() if fnmatchcase(name, glob)), None)


def check_named(globs: Iterable[str], names: Collection[str], key: str) -> None:
    """Raise RecipeError for a glob of the setting `key` that matches none of the layers' `names`. Pure."""
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise RecipeError(
                f"{key} names {glob!r}, and no layer of this model is called that",
                fix=f"a layer's name, as {next(iter(names), 'none')}, or a glob, as '*.down_proj'",
                where=f"recipe: {key}",
            )


class QuantizeSettings(Section):
    """How `export.weights: int8|int4|int2` are made: one scale per `block` weights along a row's input.

    `rule` is how levels are chosen (soco_train/numbers/rules.py): `nearest`, or `calibrated` for what each layer reads
    in `calibration_tokens` tokens of the calibration text.
    `embedding` is the type of the token table, always symmetric; a tied head shares it (int8 beside int4 weights: fewer
    bytes and a better model than an int4 copy).
    `accuracy_level` is MatMulNBits' own: 4 lets the CPU round activations to int8 per block (fast), 1 keeps them fp32.
    `blocks`: the block of single layers, by name or glob, the token table among them; goes before `block`.
    `keep` are globs of layers that stay unquantised (`lm_head`, `*.down_proj`, `*embed_tokens`).
    """

    block: Block = 32
    blocks: dict[str, Block] = Field(default_factory=dict)
    symmetric: bool = True
    rule: str = "nearest"
    calibration_tokens: int = Field(default=16384, ge=1)
    embedding: TableType = "int8"
    accuracy_level: int = Field(default=4, ge=0, le=4)
    keep: tuple[str, ...] = ()

    def block_of(self, name: str) -> int:
        """Return how many inputs share a scale in the layer `name`."""
        return named(self.blocks, name) or self.block

    def table_block(self, name: str, width: int) -> int:
        """Return the same of the token table, which is called `name`, of `width` inputs: one that divides it.

        A lookup takes no padding, so that a head could not share a table whose last block is not full; a block that
        `blocks` gives to the table is taken all the same.
        """
        sizes = [size for size in get_args(Block) if size <= self.block and width % size == 0]
        return named(self.blocks, name) or max(sizes, default=self.block)


class ExportSettings(Section):
    """One ONNX folder.

    `flavour`: `standard` uses ONNX's own operators and takes left-padded batches; `contrib` uses ONNX Runtime's
    (GroupQueryAttention) for a shared key/value buffer, one sequence or right padding. `dtype`: type of activations,
    cache and unquantised weights; logits are always float32. `weights`: int8, int4 or int2 blocks for every MatMul.
    `each`: the type of single layers, by name or glob, the token table among them; goes before `weights` and `keep`.
    `cache`: `int8` or `int4` keeps keys and values in a byte or half a byte a number (`contrib`), with scales of a
    calibration text.
    `last_token_logits`: logits of the last slot only (not for right-padded prompts). `pack`: layers that read the same
    input share one MatMul. `layouts`: what to write beside the model, by name (soco_export/runtimes/).
    """

    flavour: Flavour = "standard"
    dtype: FloatType = "float32"
    weights: WeightType = "same"
    each: dict[str, WeightType] = Field(default_factory=dict)
    quantize: QuantizeSettings = QuantizeSettings()
    cache: CacheType = "same"
    last_token_logits: bool = False
    pack: bool = False
    layouts: tuple[str, ...] = ("optimum", "genai")

    def quantizes(self, name: str) -> bool:
        """Whether the matrices of the layer `name` are stored in blocks."""
        return self.weights_of(name) != "same"

    def weights_of(self, name: str) -> WeightType:
        """Return the type that the matrices of the layer `name` are stored in."""
        return self.fixed(name) or self.weights

    def fixed(self, name: str) -> WeightType | None:
        """Return the type that `each` or `quantize.keep` gives to the layer `name`, None if they do not name it."""
        kept = any(fnmatchcase(name, glob) for glob in self.quantize.keep)
        return self._named(name) or ("same" if kept else None)

    def table_of(self, name: str) -> WeightType:
        """Return the type of the token table, which is called `name`; RecipeError for one that it cannot have."""
        usual = "same" if self.weights_of(name) == "same" else self.quantize.embedding
        kind = self._named(name) or usual
        if kind == "int2":
            raise RecipeError(
                f"export.each would store the token table {name} in int2, which no lookup reads",
                fix=f"export.each: {name}: {' or '.join(TABLE_TYPES)}",
                where="export.each",
            )
        return kind

    def _named(self, name: str) -> WeightType | None:
        return named(self.each, name)

    def planned(self, weights: Mapping[str, WeightType], blocks: Mapping[str, int]) -> ExportSettings:
        """Return the settings with the types and blocks that a plan chose, where the settings say nothing else."""
        how = self.quantize
        each = {name: kind for name, kind in weights.items() if self._named(name) is None}
        sizes = {name: block for name, block in blocks.items() if named(how.blocks, name) is None}
        quantize = how.model_copy(update={"blocks": {**how.blocks, **sizes}})
        return self.model_copy(update={"each": {**self.each, **each}, "quantize": quantize})

    def check_layers(self, names: Collection[str]) -> None:
        """Raise RecipeError for a setting of single layers that names none of `names`: the table and all Linears."""
        how = self.quantize
        check_named(self.each, names, "export.each")
        check_named(how.blocks, names, "export.quantize.blocks")
        check_named(how.keep, names, "export.quantize.keep")

    @property
    def rounded_to(self) -> WeightType:
        """What the export's error is that of: its weights, or where these are not rounded its cache."""
        return self.cache if self.weights == "same" else self.weights

    def rounding(self) -> Rounding:
        """Return the rule by which weights are rounded; RecipeError for one that nobody knows."""
        from soco_train.numbers.rules import find_rounding

        return find_rounding(self.quantize.rule)

    @property
    def calibrates(self) -> bool:
        """Whether a text is needed to round the weights."""
        return self.rounding().calibrates and bool(self.grids())

    @property
    def reads_text(self) -> bool:
        """Whether a text is needed to round weights or cache."""
        return self.calibrates or self.cache != "same"

    def grids(self) -> set[Grid]:
        """Return the grids that weights may be rounded to, each type in each block; the token table's is symmetric."""
        from soco_train.numbers.blocks import Grid

        how = self.quantize
        layers, tables = {self.weights, *self.each.values()}, {"same" if self.weights == "same" else how.embedding}
        kinds = {(kind, how.symmetric) for kind in layers} | {(kind, True) for kind in tables}
        blocks = {how.block, *how.blocks.values()}
        return {Grid(BITS[kind], block, even) for kind, even in kinds if kind != "same" for block in blocks}
