"""How a size is asked for and spent: as a share of the parameters or as bytes, in which storage form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from soco_train.errors import RecipeError
from soco_train.settings.section import Bytes, Section

STORAGE = {"stacked", "pivoted"}  # a form that is registered adds its name (soco_train/forms/base.py)
Allocation = Literal["global", "lagrangian", "uniform"]
_NO_RUNTIME = {
    "sparse": "storage sparse has no runtime: ONNX Runtime makes sparse weights dense as it loads (issues 5540, 5578)"
}


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


class PlanSettings(Section):
    """How the budget is spent.

    `keep_params`: fraction of the selected layers' parameters that stays; `keep_bytes`: size of the ONNX file instead,
    in bytes or as `90MB` (10^6) or `90MiB` (2^20): then it decides over ranks, forms and types of weights, and
    `keep_params` is what the scores are trained for.
    """

    keep_params: float = Field(default=0.8, gt=0, le=1)
    keep_bytes: Bytes | None = None
    storage: Storage = "stacked"
    allocation: Allocation = "global"
    multiple: int = Field(default=1, ge=1, description="round ranks down to a multiple (32 suits int4 kernels)")
