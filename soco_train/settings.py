"""Everything trainable that a recipe may set: one frozen pydantic model per section, unknown keys refused.

The words here are the recipe's words (`train.basis`, `refine.distill.steps`, …); soco_export.recipe composes these
sections with its own. Defaults marked [ours] are choices the paper leaves open (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from soco_train.errors import RecipeError

STORAGE = {"stacked", "pivoted"}  # a form that is registered adds its name (soco_train/forms/base.py)
Allocation = Literal["global", "lagrangian", "uniform"]
_NO_RUNTIME = {
    "sparse": "storage sparse has no runtime: ONNX Runtime makes sparse weights dense as it loads (issues 5540, 5578)"
}
ScoreFunction = Literal["relu", "softplus", "sigmoid2"]
SHORTEST_BLOCK = 8  # tokens
MOST_NUMBER = 2**53  # floats are exact up to it, and JSON of any program
HEAD_STEP = 8  # numbers of a value head that stay or go together: what a vector unit multiplies at once in fp32
MOST_SEED = 2**40  # epochs derive theirs from it, in 63 bits
SUMS_AT_ONCE = 4 * 2**30  # bytes; a pass over the calibration text costs little beside a GPU's memory
OptimiserName = Literal["adamw", "muon"]
BITS = {"int8": 8, "int4": 4, "int2": 2}  # of a number that block quantisation leaves
Block = Literal[16, 32, 64, 128, 256]
BLOCKS: tuple[Block, ...] = get_args(Block)  # inputs that can share a scale
WeightType = Literal["same", "int8", "int4", "int2"]
TYPES: tuple[WeightType, ...] = get_args(WeightType)
TABLE_TYPES: tuple[WeightType, ...] = ("same", "int8", "int4")  # that ONNX Runtime looks tokens up in
_Share = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(gt=0)]
BuiltinText = Literal["speeches", "time-machine"]


def check_storage(name: str) -> str:
    """Return the name of a storage form; RecipeError if there is none of it."""
    if name not in STORAGE:
        known = " or ".join(sorted(STORAGE))
        what = _NO_RUNTIME.get(name, f"unknown storage {name!r}")
        raise RecipeError(what, fix=f"storage: {known}", where="recipe: storage")
    return name


def _known_storage(name: str) -> str:
    """Check as `check_storage` does, in pydantic's own error: whoever reads a file turns that into one of ours."""
    try:
        return check_storage(name)
    except RecipeError as error:
        raise ValueError(f"{error.message}, {error.fix}") from error


Storage = Annotated[str, AfterValidator(_known_storage)]


SUFFIXES = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


def as_bytes(value: Any) -> Any:
    """Return the bytes of `90MB`, `1.5GiB` or `90000000`; whatever is no text as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    suffix = next((suffix for suffix in SUFFIXES if text.endswith(suffix)), "")
    try:
        return int(float(text.removesuffix(suffix)) * SUFFIXES.get(suffix, 1))
    except (ValueError, OverflowError):
        raise ValueError(f"{value[:40]!r} is no size: give 90MB, 85MiB or a number of bytes") from None


def _scalars(value: Any) -> Iterator[Any]:
    """Yield what a nested value is made of."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _scalars(part)
    else:
        yield value


class Section(BaseModel):
    """A recipe section: immutable, and a misspelt key or an infinite number is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _numbers_that_are_some(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where no truth is asked for, and whole numbers that no array counts to.

        Python would take the former for 1 and 0, and knows no largest number.
        """
        annotation = str(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, Mapping) and "dict" not in annotation:
            return value  # a section, which looks at its own
        truth = "bool" in annotation or "Any" in annotation
        for number in (number for number in _scalars(value) if isinstance(number, int)):
            if isinstance(number, bool) and not truth:
                raise ValueError(f"{str(number).lower()} is no value for it")
            if abs(number) > MOST_NUMBER:
                raise ValueError("a whole number goes up to 2^53")
        return value


class OpenSection(Section):
    """A section in which a step that is registered may have one of its own, under the step's name.

    A name that no step has is refused like any other misspelt key. A step that is not asked for leaves no trace.
    """

    model_config = ConfigDict(extra="allow")
    of_steps: ClassVar[dict[str, type[Section]]]

    @model_validator(mode="before")
    @classmethod
    def _sections_of_steps(cls, values: Any) -> Any:
        """Read the section of each registered step; everything else is left to pydantic, or refused."""
        if not isinstance(values, Mapping):
            return values
        own = {key: value for key, value in values.items() if key not in cls.model_fields}
        found = {key: _own_section(cls, key, value) for key, value in own.items()}
        return {**values, **found}

    def of_step(self, name: str) -> Any:
        """Return the section of a step, with its defaults where the recipe says nothing of it."""
        known = getattr(self, name, None)
        return self.of_steps[name]() if known is None else known


def _own_section(owner: type[OpenSection], key: str, value: Any) -> Section:
    if key not in owner.of_steps:
        raise ValidationError.from_exception_data(
            owner.__name__, [{"type": "extra_forbidden", "loc": (key,), "input": value}]
        )
    try:
        return owner.of_steps[key].model_validate(value)
    except ValidationError as error:
        found = [{**line, "loc": (key, *line["loc"])} for line in error.errors(include_url=False)]
        raise ValidationError.from_exception_data(owner.__name__, found) from error  # type: ignore[arg-type]


class DataSettings(Section):
    """A text source and how it is cut into blocks; exactly one of `path`, `hub`, `builtin` is set.

    `block` is in tokens; `blocks` caps how many are used (None: all). `format` "auto" goes by suffix: `.jsonl` reads
    the field `text` of each line, `.raw` is WikiText rows joined by an empty line, anything else is plain text.
    """

    path: Path | Annotated[tuple[Path, ...], Field(min_length=1)] | None = None
    hub: str | None = None
    builtin: BuiltinText | Annotated[tuple[BuiltinText, ...], Field(min_length=1)] | None = None
    format: Literal["auto", "text", "jsonl", "wikitext"] = "auto"
    block: int = Field(default=512, ge=SHORTEST_BLOCK)
    blocks: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> DataSettings:
        if sum(source is not None for source in (self.path, self.hub, self.builtin)) != 1:
            raise ValueError("exactly one of path, hub, builtin must be set")
        return self


class LayerSettings(Section):
    """Which nn.Linear modules take part: fnmatch globs over module names; `*` crosses dots."""

    include: tuple[str, ...] = ("*.layers.*", "*.h.*", "*.blocks.*")
    exclude: tuple[str, ...] = ("*lm_head*", "*embed*", "*norm*", "*router*", "*.gate")


class PhaseSettings(Section):
    """SoCo's three phases (docs/method.md §2): preset fractions of the steps, and the optional stopping rules."""

    phases: tuple[Literal[1, 2, 3], ...] = Field(default=(1, 2, 3), min_length=1)
    shares: tuple[_Share, _Share, _Share] = (0.3, 0.4, 0.3)
    reach: float = Field(default=0.7, gt=0, le=1, description="part of phase 1 after which the soft size meets R")
    freeze: float = Field(
        default=0.1, ge=0, lt=1, description="last part of all steps: support frozen, survivors train"
    )
    overshoot: float = Field(default=0.02, ge=0, description="phase 2: size pressure returns above R(1 + overshoot)")
    stop_early: bool = False

    @model_validator(mode="after")
    def _possible(self) -> PhaseSettings:
        if list(self.phases) != sorted(set(self.phases)):
            raise ValueError("phases are each given once, in order: [1, 2, 3]")
        if not sum(self.shares[number - 1] for number in self.phases):
            raise ValueError("the phases have no share of the steps")
        return self


class AcipSettings(Section):
    """Where the adapter works: inside the masked inner factor [ours], or beside the masked layer, as published."""

    adapter: Literal["merged", "beside"] = "merged"


class TrainSettings(OpenSection):
    """How scores are learnt. `lr`: on the scores; `steps` optimiser steps of `batch_tokens` tokens each."""

    of_steps: ClassVar[dict[str, type[Section]]] = {}
    scorer: str = "soco"
    acip: AcipSettings = AcipSettings()
    basis: str = "whitened"
    ridge: float = Field(default=1e-6, ge=0, description="added to the covariance diagonal, as a share of its mean")
    statistics_blocks: int | None = Field(default=None, ge=1, description="calibration blocks behind the covariances")
    statistics_memory: Annotated[int, BeforeValidator(as_bytes), Field(ge=1)] = Field(
        default=SUMS_AT_ONCE,
        description="bytes of covariances that one pass over the text collects, as 64GiB or a number",
    )
    fisher_blocks: int = Field(default=16, ge=1)
    start: Literal["ones", "fisher", "spectrum"] = "ones"
    keep_params: float | None = Field(
        default=None, gt=0, le=1, description="size the scores are trained for, to be cut at others; none: the model's"
    )
    steps: int = Field(default=200, ge=0)
    batch_tokens: int = Field(default=1024, ge=8)
    lr: float = Field(default=3e-3, gt=0)
    lr_deviation: float = Field(default=1e-3, gt=0)
    lr_factors: float = Field(
        default=0, ge=0, description="on the components' own P and B, which then learn beside their scores; 0: frozen"
    )
    warmup: float = Field(default=0.03, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0)
    score_function: ScoreFunction = "relu"
    deviation: bool = True
    rescale: bool = Field(default=True, description="false: survivors keep the scale they had; scores only select")
    select: bool = Field(
        default=True, description="false: within a layer the largest σ survive; scores only reallocate"
    )
    threshold: float = Field(default=0.5, gt=0, lt=1, description="τ of the soft size")
    temperature: tuple[Temperature, Temperature] = Field(
        default=(0.1, 0.02), description="κ of the soft size: at first, at the end"
    )
    size_weight: float = Field(default=1.0, gt=0, description="λ_d before it is scaled to the schedule")
    polarise_weight: float = Field(default=1.0, ge=0)
    schedule: PhaseSettings = PhaseSettings()
    checkpoint_every: int = Field(default=25, ge=1)
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    factor_dtype: Literal["float32", "bfloat16"] = "float32"
    checkpoint_activations: bool = False
    logit_chunk: int = Field(default=2048, ge=1, description="tokens whose fp32 tables exist at one time in the loss")


class CompensateSettings(Section):
    """Closed-form compensation of the surviving scores (optimal brain surgeon in σ-space); `blocks` 0: off."""

    blocks: int = Field(default=0, ge=0, description="calibration blocks behind the Fisher matrices; 0: off")
    ridge: float = Field(default=0.1, gt=0, description="added to the Fisher diagonal, as a share of its mean")
    ceiling: float = Field(default=2.0, ge=1, description="no score is raised above it")


class RefitSettings(Section):
    """Closed-form refit of the factors, layer by layer; `blocks` 0: off."""

    blocks: int = Field(default=0, ge=0, description="calibration blocks that flow through the decoder; 0: off")
    own_input: float = Field(
        default=0.75, ge=0, le=1, description="weight of the dense layer on the pruned model's own input"
    )
    ridge: float = Field(default=1e-3, gt=0, description="pull to the present factors, as a share of the mean variance")
    weights: Literal["inputs", "fisher"] = Field(
        default="inputs", description="fisher: the dense weight, each number's error by its Fisher information (TFWSVD)"
    )
    sweeps: int = Field(default=10, ge=1, description="with weights: fisher, times that both factors are fitted")


class FlattenSettings(Section):
    """How much of the logarithm of singular values is taken away: 1/2 is their root, 1 makes them equal; 0: off."""

    by: float = Field(default=0, ge=0, le=1)


class ValueSettings(Section):
    """Numbers of each value head that attention caches, in closed form; `keep` 1: all of them, off.

    The projections of values then have no rank: they take no part in the plan, and keep_params does not count them.
    """

    keep: float = Field(default=1, gt=0, le=1, description="share of a value head's numbers, in steps of 8; 1: off")
    blocks: int | None = Field(default=None, ge=1, description="calibration blocks behind it; none: all")

    @property
    def narrows(self) -> bool:
        """Whether values get fewer numbers."""
        return self.keep < 1

    def numbers(self, size: int) -> int:
        """Return the numbers that stay of a value head of `size`."""
        return min(size, max(HEAD_STEP, round(self.keep * size / HEAD_STEP) * HEAD_STEP))


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


class AdapterSettings(Section):
    """Few numbers beside frozen factors that are trained in their place, then added; `rank` 0: the factors are trained.

    `experts` 1 is LoRA; k: a sum of k Kronecker products, of as many numbers and up to k² times the rank (ALoRE).
    """

    rank: int = Field(default=0, ge=0)
    experts: int = Field(default=1, ge=1, le=16)


class DistillSettings(Section):
    """End-to-end distillation of the surviving factors: KL to the dense model plus `ce_weight` × cross entropy."""

    steps: int = Field(default=0, ge=0)
    batch_tokens: int = Field(default=1024, ge=8)
    optimiser: OptimiserName = "adamw"
    lr: float = Field(default=3e-4, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    ce_weight: float = Field(default=0.0, ge=0)
    easy: float = Field(
        default=0,
        ge=0,
        le=1,
        description="taken from the loss's weight on tokens that a bigram table foretells; 0: off",
    )
    clip: float = Field(default=1.0, gt=0)
    teacher_top: int = Field(
        default=0, ge=0, description="likeliest tokens remembered of the dense model's predictions; 0: made afresh"
    )
    rounding: RoundingSettings = RoundingSettings()
    rate: float = Field(
        default=0, ge=0, description="nats of loss for each bit that a rounded number takes in an entropy coder; 0: off"
    )
    adapter: AdapterSettings = AdapterSettings()
    checkpoint_activations: bool = False
    shard: bool = Field(
        default=False, description="several processes divide the factors and their optimiser state (FSDP2)"
    )
    held_out_blocks: int = Field(default=0, ge=0, description="last calibration blocks kept to stop early by; 0: off")
    evaluate_every: int = Field(default=25, ge=1, description="steps between two looks at the held-out blocks")
    patience: int = Field(default=3, ge=1, description="looks without a better loss that end the distillation")
    checkpoint_every: int = Field(default=25, ge=1)
    sizes: tuple[Fraction, Fraction] | None = Field(
        default=None,
        description="smallest and largest keep_params that the factors can be cut to afterwards; none: one",
    )

    @model_validator(mode="after")
    def _rate_of_rounded(self) -> DistillSettings:
        if self.rate and (self.rounding.weights == "same" or self.shard):
            raise ValueError(
                "rate prices the numbers that rounding.weights rounds, in one process or copies, not shards"
            )
        return self

    @model_validator(mode="after")
    def _any_size(self) -> DistillSettings:
        if self.sizes is None:
            return self
        if self.sizes[0] > self.sizes[1]:
            raise ValueError("sizes are the smallest keep_params and then the largest: [0.4, 0.8]")
        if not self.steps or self.checkpoint_activations or self.rounding.weights != "same":
            raise ValueError("sizes needs steps, and neither checkpoint_activations nor rounding.weights")
        return self

    @model_validator(mode="after")
    def _adapter_alone(self) -> DistillSettings:
        other = self.sizes or self.shard or self.rounding.weights != "same" or self.optimiser != "adamw"
        if self.adapter.rank and other:
            raise ValueError("adapter.rank needs optimiser: adamw, and no sizes, rounding.weights or shard")
        return self


class RefineSettings(OpenSection):
    """What happens to the factors after the cut, in this order; each rung is off unless asked for."""

    of_steps: ClassVar[dict[str, type[Section]]] = {}
    compensate: CompensateSettings = CompensateSettings()
    refit: RefitSettings = RefitSettings()
    flatten: FlattenSettings = FlattenSettings()
    values: ValueSettings = ValueSettings()
    distill: DistillSettings = DistillSettings()

    @model_validator(mode="after")
    def _any_size(self) -> RefineSettings:
        if self.distill.sizes and (self.compensate.blocks or self.refit.blocks or self.values.narrows):
            raise ValueError(
                "compensate, refit and values fit the factors to one size: leave them off with distill.sizes"
            )
        return self


class PlanSettings(Section):
    """How the budget is spent.

    `keep_params`: fraction of the selected layers' parameters that stays; `keep_bytes`: size of the ONNX file instead,
    in bytes or as `90MB` (10^6) or `90MiB` (2^20): then it decides over ranks, forms and types of weights, and
    `keep_params` is what the scores are trained for.
    """

    keep_params: float = Field(default=0.8, gt=0, le=1)
    keep_bytes: Annotated[int, Field(ge=1), BeforeValidator(as_bytes)] | None = None
    storage: Storage = "stacked"
    allocation: Allocation = "global"
    multiple: int = Field(default=1, ge=1, description="round ranks down to a multiple (32 suits int4 kernels)")
