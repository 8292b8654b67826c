"""One section of a recipe: a frozen pydantic model in which unknown keys and infinite numbers are errors.

The words of the sections are the recipe's words (`train.basis`, `refine.distill.steps`, …); soco_export.recipe composes
them with its own. Defaults marked [ours] are choices the paper leaves open (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

MOST_NUMBER = 2**53  # floats are exact up to it, and JSON of any program
_SUFFIXES = {"GIB": 2**30, "MIB": 2**20, "KIB": 2**10, "GB": 10**9, "MB": 10**6, "KB": 10**3, "B": 1}


def as_bytes(value: Any) -> Any:
    """Return the bytes of `90MB`, `1.5GiB` or `90000000`; whatever is no text as it is."""
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    suffix = next((suffix for suffix in _SUFFIXES if text.endswith(suffix)), "")
    try:
        return int(float(text.removesuffix(suffix)) * _SUFFIXES.get(suffix, 1))
    except (ValueError, OverflowError):
        raise ValueError(f"{value[:40]!r} is no size: give 90MB, 85MiB or a number of bytes") from None


Bytes = Annotated[int, Field(ge=1), BeforeValidator(as_bytes)]


def scalars(value: Any) -> Iterator[Any]:
    """Yield what a nested value is made of."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from scalars(part)
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
        for number in (number for number in scalars(value) if isinstance(number, int)):
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
