"""A plan: one rank per layer, what else was chosen beside it, and plan.json. Pure: no modules of a model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, TypeAdapter, ValidationError

from soco_train.bounded import MADE_ANEW, parse_object, read_text
from soco_train.errors import DataError, RecipeError
from soco_train.plan.left_out import AS_WRITTEN, LeftOut, taking_part
from soco_train.settings.plan import Allocation, Storage
from soco_train.settings.refine import ValueSettings
from soco_train.settings.rounding import RoundingSettings, WeightType

_Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class LayerPlan:
    """The size of one layer: rank (min(m, n) when dense), its parameters, and why it stays dense (else empty).

    A layer that is neither cut nor whole makes or reads value heads of fewer numbers: that is its reason.
    """

    __pydantic_config__: ClassVar = AS_WRITTEN
    shape: tuple[_Count, _Count]
    rank: _Count
    dense: bool
    params: _Count
    reason: str

    @property
    def whole(self) -> bool:
        """Whether it stays as it is."""
        return self.dense and not self.narrowed

    @property
    def narrowed(self) -> bool:
        """Whether it has its full rank and fewer numbers a value head."""
        return self.dense and self.params < self.shape[0] * self.shape[1]

    @property
    def share(self) -> float:
        """Which of its components stay, or of the numbers of its value heads."""
        return self.params / (self.shape[0] * self.shape[1]) if self.dense else self.rank / min(self.shape)


@dataclass(frozen=True)
class BytePlan:
    """What a plan for `keep_bytes` chose beside ranks.

    written: bytes of the file that it counts on; forms: of the pruned layers, by name; weights: type of each layer's
    matrices, token table and head included; blocks: inputs of a block of those that are rounded. measured: KL from the
    dense model on `tokens` held-out tokens, of each candidate by name, `chosen` too; empty where the price alone
    decided.
    """

    __pydantic_config__: ClassVar = AS_WRITTEN
    keep_bytes: _Count
    written: _Count
    forms: Mapping[str, Storage]
    weights: Mapping[str, WeightType]
    blocks: Mapping[str, int] = field(default_factory=dict)
    chosen: str = ""
    measured: Mapping[str, float] = field(default_factory=dict)
    tokens: Annotated[int, Field(ge=0)] = 0

    def describe(self) -> str:
        """Return how many bytes, and how it was chosen."""
        text = f"{self.written:,} of {self.keep_bytes:,} bytes"
        if not self.measured:
            return f"{text}, {self.chosen}" if self.chosen else text
        return f"{text}, {self.chosen}: the best of {len(self.measured)} by KL on {self.tokens:,} held-out tokens"


@dataclass(frozen=True)
class RankPlan:
    """One rank per participating layer, in model order, and the settings it answers.

    `bytes`: types and forms, layer by layer, where bytes were the budget; else every layer is stored as `storage`.
    `left_out`: weights of the blocks that take no part, by tensor name. `values`: numbers of each value head that stay,
    by the name of v_proj, where that was chosen instead of ranks of it and of the projection that reads the values.
    """

    __pydantic_config__: ClassVar = AS_WRITTEN
    layers: Annotated[Mapping[str, LayerPlan], Field(min_length=1)]
    keep_params: Annotated[float, Field(gt=0, le=1)]
    storage: Storage
    allocation: Allocation
    bytes: BytePlan | None = None
    left_out: Mapping[str, LeftOut] = field(default_factory=dict)
    values: Mapping[str, _Count] = field(default_factory=dict)

    @property
    def forms(self) -> Mapping[str, Storage]:
        """Return the forms of layers that are not all stored as `storage`."""
        return self.bytes.forms if self.bytes else {}

    @property
    def weights(self) -> Mapping[str, WeightType]:
        """Return the types of weights that were chosen, by layer; empty where the plan chose none."""
        return self.bytes.weights if self.bytes else {}

    @property
    def blocks(self) -> Mapping[str, int]:
        """Return the inputs of a block that were chosen, by layer; empty where the plan chose none."""
        return self.bytes.blocks if self.bytes else {}

    def rounding(self, settings: RoundingSettings) -> RoundingSettings:
        """Return the settings with the type and block that the plan chose for each layer, where they ask for it.

        Layers whose rounded numbers are others than those that are trained stay as they are.
        """
        from soco_train.forms.registry import find_form

        if settings.weights != "planned":
            return settings
        other = {name for name, form in self.forms.items() if not find_form(form).rounded_as_trained}
        each = {name: self.weights[name] for name in self.layers if name not in other}
        return settings.model_copy(update={"each": each, "blocks": dict(self.blocks)})

    def fewer_values(self, settings: ValueSettings) -> ValueSettings:
        """Return the settings with the numbers of value heads that the plan chose, where they ask for it.

        Raises RecipeError where they do not, and the plan counts on it.
        """
        if self.values and not settings.planned:
            raise RecipeError(
                f"the plan gives {len(self.values)} attentions fewer numbers a value head, and nothing asks for that",
                fix="refine.values.keep: planned, as when the scores were learnt",
                where="recipe: refine.values.keep",
            )
        return settings.model_copy(update={"each": dict(self.values)}) if settings.planned else settings

    @property
    def params_before(self) -> int:
        """Parameters of the participating layers when dense."""
        return sum(layer.shape[0] * layer.shape[1] for layer in self.layers.values())

    @property
    def params_after(self) -> int:
        """Parameters of the participating layers as planned, deviations included."""
        return sum(layer.params for layer in self.layers.values())

    @property
    def dropped(self) -> int:
        """Parameters that a refinement takes of weights that have no rank."""
        return sum(weight.dropped for weight in self.left_out.values())

    @property
    def ratio(self) -> float:
        """params_after / params_before: at most keep_params."""
        return self.params_after / self.params_before

    @property
    def dense_layers(self) -> dict[str, str]:
        """Layers left dense, with the reason."""
        return {name: layer.reason for name, layer in self.layers.items() if layer.whole}

    def describe(self, total: int) -> str:
        """Return the plan in one line; `total` is the parameter count of the whole dense model."""
        before, after = self.params_before, self.params_after
        text = (
            f"{_millions(total)} → {_millions(total - before + after - self.dropped)} "
            f"(selected {_millions(before)} → {_millions(after)}) · "
            f"{len(self.dense_layers)} of {len(self.layers)} layers left dense"
        )
        if self.values:
            text = f"{text} · {len(self.values)} attentions with smaller values"
        if self.left_out:
            text = f"{text} · {taking_part(before, self.left_out):.1%} of the blocks' weights take part"
        if self.bytes is None:
            return f"{text} · stored {self.storage}"
        return f"{text} · {self.bytes.describe()}"

    def to_json(self) -> str:
        """Return the plan as the text of plan.json."""
        totals = {"params_before": self.params_before, "params_after": self.params_after}
        document = asdict(self)
        if self.bytes is None:
            del document["bytes"]
        for key in [key for key in ("left_out", "values") if not document[key]]:
            del document[key]
        for weight in document.get("left_out", {}).values():
            if weight["stay"] is None:
                del weight["stay"]
        return json.dumps(document | totals, indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> RankPlan:
        """Read what `to_json` wrote; DataError if it is something else."""
        found = parse_object(text, "the rank plan", "plan.json", MADE_ANEW)
        known = {field.name: found[field.name] for field in fields(RankPlan) if field.name in found}
        try:
            plan: RankPlan = TypeAdapter(RankPlan).validate_json(json.dumps(known))
        except ValidationError as error:
            first = error.errors()[0]
            raise _no_plan(".".join(map(str, first["loc"])), first["msg"]) from error
        _check_possible(plan)
        return plan

    @staticmethod
    def load(path: Path) -> RankPlan:
        """Read a plan.json; DataError if it cannot be read or is something else."""
        return RankPlan.from_json(read_text(path, MADE_ANEW))


def _check_possible(plan: RankPlan) -> None:
    """Raise DataError for a rank above full, a dense layer below it, or a form of a layer that is not there."""
    for name, layer in plan.layers.items():
        full = min(layer.shape)
        if layer.rank > full or layer.dense > (layer.rank == full):
            raise _no_plan(f"layers.{name}", f"rank {layer.rank} of {full}, dense: {layer.dense}")
    if strangers := plan.forms.keys() - plan.layers.keys():
        raise _no_plan("bytes.forms", f"{min(strangers)} is no layer of the plan")
    narrowed = [name for name, layer in plan.layers.items() if layer.narrowed]
    if strangers := plan.values.keys() - narrowed:
        raise _no_plan("values", f"{min(strangers)} is no layer with fewer numbers a value head")
    if len(narrowed) != 2 * len(plan.values):
        raise _no_plan("values", f"{len(narrowed)} layers have fewer numbers a value head, two for each attention")
    for name, stay in plan.values.items():
        if plan.layers[name].params % (stay * plan.layers[name].shape[1]):
            raise _no_plan(f"values.{name}", f"no heads of {stay} numbers have {plan.layers[name].params} parameters")


def _no_plan(place: str, why: str) -> DataError:
    return DataError(f"this is no rank plan: {place}: {why}"[:400], fix=MADE_ANEW, where="plan.json")


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}M" if count >= 1e5 else f"{count:,}"
