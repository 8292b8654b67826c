"""How scores are learnt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from soco_train.settings.section import Bytes, OpenSection, Section

ScoreFunction = Literal["relu", "softplus", "sigmoid2"]
SUMS_AT_ONCE = 4 * 2**30  # bytes; a pass over the calibration text costs little beside a GPU's memory
MOST_SEED = 2**40  # epochs derive theirs from it, in 63 bits
_Share = Annotated[float, Field(ge=0)]
Temperature = Annotated[float, Field(gt=0)]


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
    statistics_memory: Bytes = Field(
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
