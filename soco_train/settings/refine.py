"""What happens to the factors after the cut."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from soco_train.settings.distill import DistillSettings
from soco_train.settings.section import OpenSection, Section

HEAD_STEP = 8  # numbers of a value head that stay or go together: what a vector unit multiplies at once in fp32


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


def _share_or_planned(value: Any) -> Any:
    """Refuse what is neither, in one sentence: pydantic has one for each of the two."""
    if value != "planned" and not (isinstance(value, int | float) and 0 < value <= 1):
        raise ValueError("give a share above 0 and up to 1, or planned")
    return value


class ValueSettings(Section):
    """Numbers of each value head that attention caches, in closed form; `keep` 1: all of them, off.

    With a share the projections of values have no rank: they take no part in the plan, and keep_params does not count
    them. `planned`: they take part, and the plan gives each attention ranks or fewer numbers, whichever loses less;
    `each` is then what it chose, by the name of v_proj.
    """

    keep: Annotated[float | int | Literal["planned"], BeforeValidator(_share_or_planned)] = Field(
        default=1, description="share of a value head's numbers, in steps of 8, or planned: by price; 1: off"
    )
    each: dict[str, int] = Field(default_factory=dict)
    blocks: int | None = Field(default=None, ge=1, description="calibration blocks behind it; none: all")

    @property
    def narrows(self) -> bool:
        """Whether values get, or may get, fewer numbers."""
        return self.keep != 1

    @property
    def planned(self) -> bool:
        """Whether the plan decides."""
        return self.keep == "planned"

    def numbers(self, size: int, name: str = "") -> int:
        """Return the numbers that stay of a value head of `size`, which v_proj `name` makes; all if that is open."""
        if self.keep == "planned":
            return self.each.get(name, size)
        return min(size, max(HEAD_STEP, round(self.keep * size / HEAD_STEP) * HEAD_STEP))


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
