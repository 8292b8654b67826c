"""How the factors are distilled."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from soco_train.settings.rounding import RoundingSettings
from soco_train.settings.section import Section

OptimiserName = Literal["adamw", "muon"]
Fraction = Annotated[float, Field(gt=0, le=1)]


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
