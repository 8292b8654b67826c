"""The bytes of the ONNX file that a plan will give, counted before anything is trained, rounded or written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from soco_export.model.load import dense_config, dense_skeleton
from soco_export.onnx.build import count_bytes
from soco_export.onnx.check import check_architecture
from soco_export.onnx.describe.config import as_config
from soco_export.onnx.settings import named
from soco_export.onnx.source import BlankWeights, StoredForm
from soco_export.recipe.recipe import Recipe
from soco_train.cost import BYTES
from soco_train.errors import RecipeError
from soco_train.forms.registry import planned_forms
from soco_train.modules.layers import select_linears
from soco_train.modules.participation import left_out
from soco_train.modules.sites import open_sites
from soco_train.plan.bytes import (
    Choice,
    Menu,
    Packing,
    Tables,
    bytes_of,
    choose_storage,
    errors_of,
    menus_of,
    table_menus,
)
from soco_train.plan.left_out import HARDLY_VISITED, LeftOut
from soco_train.settings.rounding import BITS, TABLE_TYPES, TYPES, WeightType
from soco_train.store.damage import DENSE, Damage, LayerDamage, StorageKind, no_damage, types_of

_TRIES = 12
_NEARLY = 1.01  # times the budget: what is larger is no candidate
BLOCK_SIZES = (32, 64, 128)  # of blocks: 16 costs more than it gains, 256 pads most layers


@dataclass(frozen=True)
class _Candidate:
    """Choices with their error by price."""

    error: float
    name: str
    choices: dict[str, Choice]


class FileBytes:
    """Counts model.onnx and model.onnx.data of a recipe's model, and plans their size.

    An expert that has no price, for the calibration text hardly visits it, stays as it is. Raises RecipeError for an
    architecture whose graph another program makes.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        config = as_config(dense_config(recipe), where=f"model {recipe.name}")
        architecture = check_architecture(config, recipe.export)
        if architecture is None:
            raise RecipeError(
                "keep_bytes needs an architecture whose every matrix is known here, and torch traces this one",
                fix="give keep_params instead",
                where="recipe: keep_bytes",
            )
        self.architecture = architecture
        model = dense_skeleton(recipe)
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        open_sites(model)
        self.linears = {
            name: (linear.out_features, linear.in_features)
            for name, linear in select_linears(model, recipe.layers).items()
        }
        if unknown := sorted(self.linears.keys() - architecture.linears().keys()):
            raise RecipeError(
                f"keep_bytes counts layers by their names in the graph, and {unknown[0]} has another one there",
                fix="give keep_params instead",
                where="recipe: keep_bytes",
            )
        self.left_out = left_out(model, self.linears, recipe.layers)
        self.tables = Tables(architecture.tensors.embed, architecture.tensors.head, architecture.tied)
        self._counted: dict[tuple[tuple[str, Choice], ...], int] = {}
        self.packing = Packing(BYTES[recipe.export.dtype], recipe.export.quantize.symmetric)

    def priced(self, damage: Damage) -> dict[str, tuple[int, int]]:
        """Return the layers that have a price, with their shapes."""
        return {name: shape for name, shape in self.linears.items() if name in damage.layers}

    def unpriced(self, damage: Damage) -> dict[str, LeftOut]:
        """Return the weights of the blocks that no plan chooses for, and why."""
        rest = self.linears.keys() - damage.layers.keys()
        return self.left_out | {f"{name}.weight": LeftOut(self.linears[name], HARDLY_VISITED) for name in sorted(rest)}

    def count(self, choices: Mapping[str, Choice], damage: Damage) -> int:
        """Return the bytes of the two files with these choices; what has been counted is remembered."""
        known = tuple(choices.items())
        if known not in self._counted:
            self._counted[known] = self._count(choices, damage)
        return self._counted[known]

    def _count(self, choices: Mapping[str, Choice], damage: Damage) -> int:
        forms = {
            name: (StoredForm(choice.form, choice.rank), damage.layers[name].biased or f"{name}.bias" in self.shapes)
            for name, choice in choices.items()
            if choice.form != DENSE
        }
        settings = self.recipe.export.planned(*self.types(choices))
        return count_bytes(self.architecture, BlankWeights(self.architecture, self.shapes, forms), settings)

    def types(self, choices: Mapping[str, Choice]) -> tuple[dict[str, WeightType], dict[str, int]]:
        """Return (type, inputs of a block) of every matrix; a tied head is stored as the table, if it has no copy."""
        found = {self.tables.head: choices[self.tables.table], **choices}
        blocks = {name: choice.block for name, choice in found.items() if choice.block}
        return {name: choice.weights for name, choice in found.items()}, blocks

    def candidates(self, damage: Damage, keep_bytes: int) -> dict[str, dict[str, Choice]]:
        """Return the choices within `keep_bytes` that are worth measuring, by name; the best by price is the first.

        With the token table in each type that it may have: the plan by price, and of the dense models of one type and
        block, which somebody would make without a plan, the one that loses least by the same price.
        """
        found: list[_Candidate] = []
        fixed = self._fixed(damage)
        menus = {name: menu for name, menu in self._menus(fixed).items() if name in self.linears}
        for table in TYPES:
            if (layers := self._with_table(fixed, table)) is None:
                continue
            whole = menus | table_menus(layers, self.packing, self.tables)
            if planned := self._priced(whole, layers, f"by price, token table in {table}", keep_bytes):
                beside = self._beside(whole, planned.choices, damage)
                found += [planned, *self._best_uniform(layers, table, keep_bytes, beside)]
        return {one.name: one.choices for one in sorted(found, key=lambda one: one.error)}

    def _best_uniform(self, damage: Damage, table: WeightType, keep_bytes: int, beside: int) -> Iterator[_Candidate]:
        """Yield the dense model of one type and block that loses least, if any fits.

        beside: about what a file takes beside its matrices; only what seems best is counted.
        """
        found: list[tuple[float, str, dict[str, Menu]]] = []
        for weights, block in in_blocks(TYPES):
            menus = self._menus(self._uniform(damage, weights, block, keep_bytes - beside))
            if bytes_of(menus, _least(menus)) + beside <= keep_bytes * _NEARLY:
                best = choose_storage(menus, keep_bytes - beside)
                found.append((errors_of(menus, best), _name(weights, block, table), menus))
        for _, name, menus in sorted(found, key=lambda one: one[0]):
            if candidate := self._priced(menus, damage, name, keep_bytes):
                yield candidate
                return

    def _priced(self, menus: Mapping[str, Menu], damage: Damage, name: str, keep_bytes: int) -> _Candidate | None:
        """Return the plan by price, None if none is that small."""
        if self.count(_least(menus), damage) > keep_bytes:
            return None
        choices = self._plan(menus, damage, keep_bytes)[0]
        return _Candidate(errors_of(menus, choices), name, choices)

    def _with_table(self, damage: Damage, weights: WeightType) -> Damage | None:
        """Return the damage with the token table in one type alone; None if it may not have that."""
        table = damage.layers[self.tables.table].only(weights)
        return Damage({**damage.layers, self.tables.table: table}) if table.curves else None

    def _uniform(self, damage: Damage, weights: WeightType, block: int, matrices: int) -> Damage:
        """Return the damage with all layers dense, of one type and block alone, or what is smaller if that nearly fits.

        matrices: bytes that they have, about. A budget that is another export's size to the byte would else leave that
        model out for a few bytes of metadata.
        """
        names = [*self.priced(damage), *([] if self.tables.tied else [self.tables.head])]
        alone = {name: damage.layers[name].alone(DENSE, weights, block) for name in names}
        found = Damage({**damage.layers, **alone})
        menus = self._menus(found)
        if not matrices / _NEARLY < bytes_of(menus, _least(menus)) < matrices * _NEARLY:
            return found
        smaller = {name: self._no_larger(damage.layers[name], *alone[name].curves) for name in names}
        return Damage({**damage.layers, **smaller})

    def _no_larger(self, layer: LayerDamage, kind: StorageKind) -> LayerDamage:
        """Return the errors of a dense layer in this kind and in all that take no more bytes."""

        def size(kind: StorageKind) -> int:
            return self.packing.matrix(*layer.shape, kind[1], kind[2])

        dense = {other: curve for other, curve in layer.curves.items() if other[0] == DENSE}
        return replace(layer, curves={other: curve for other, curve in dense.items() if size(other) <= size(kind)})

    def plan(self, damage: Damage, keep_bytes: int) -> tuple[dict[str, Choice], int]:
        """Return (choices, bytes written): the least damage found in at most `keep_bytes`; RecipeError if none fits.

        What a file takes beside its matrices (names, nodes, norms) depends a little on the choice, so it is counted for
        each choice that is looked at, and the next one is made with what was found.
        """
        menus = self._menus(damage)
        self._refuse_less(menus, damage, keep_bytes)
        return self._plan(menus, damage, keep_bytes)

    def _plan(self, menus: Mapping[str, Menu], damage: Damage, keep_bytes: int) -> tuple[dict[str, Choice], int]:
        best, written = _least(menus), 0
        inner, tried = keep_bytes - self._beside(menus, best, damage), set()
        for _ in range(_TRIES):
            choices = choose_storage(menus, inner)
            matrices, beside = bytes_of(menus, choices), self._beside(menus, choices, damage)
            if written < matrices + beside <= keep_bytes:
                best, written = choices, matrices + beside
            tried.add(matrices)
            inner = keep_bytes - beside if matrices + beside <= keep_bytes else min(keep_bytes - beside, matrices - 1)
            if bytes_of(menus, choose_storage(menus, inner)) in tried:
                break
        return best, written or self.count(best, damage)

    def check(self, keep_bytes: int) -> None:
        """Raise RecipeError if no plan can be that small."""
        table = (self.architecture.vocab, self.architecture.hidden)
        shapes = {**self.linears, self.tables.head: table, self.tables.table: table}
        own = [kind for form in (DENSE, *planned_forms()) for kind in _kinds(form, types_of(form))]
        kinds = {name: own for name in self.linears}
        kinds |= {self.tables.head: _kinds(DENSE, TYPES), self.tables.table: _kinds(DENSE, TABLE_TYPES)}
        damage = no_damage(shapes, kinds)
        self._refuse_less(self._menus(damage), damage, keep_bytes)

    def _menus(self, damage: Damage) -> dict[str, Menu]:
        """Return what each layer may be; a type or block that the recipe gives to a layer is the only one."""
        return menus_of(self._fixed(damage), self.packing, self.recipe.multiple, self.tables)

    def _fixed(self, damage: Damage) -> Damage:
        """Return the damage without the types and blocks that the recipe does not allow."""
        export = self.recipe.export
        layers = {
            name: layer.only(export.fixed(name), named(export.quantize.blocks, name))
            for name, layer in damage.layers.items()
        }
        return Damage(layers)

    def _beside(self, menus: Mapping[str, Menu], choices: Mapping[str, Choice], damage: Damage) -> int:
        """Return the bytes of all that the menus do not count."""
        return self.count(choices, damage) - bytes_of(menus, choices)

    def _refuse_less(self, menus: Mapping[str, Menu], damage: Damage, keep_bytes: int) -> None:
        least = self.count(_least(menus), damage)
        if least > keep_bytes:
            raise RecipeError(
                f"keep_bytes {keep_bytes:,} is less than the smallest file: every layer at its least",
                fix=f"the smallest possible keep_bytes here is {least}",
                where="recipe: keep_bytes",
            )


def in_blocks(types: Iterable[WeightType]) -> list[tuple[WeightType, int]]:
    """Return each type in each size of block that a plan may choose; floats have none."""
    return [(weights, block) for weights in types for block in (BLOCK_SIZES if weights in BITS else (0,))]


def _kinds(form: str, types: Sequence[WeightType]) -> list[StorageKind]:
    return [(form, *kind) for kind in in_blocks(types)]


def _name(weights: WeightType, block: int, table: WeightType) -> str:
    how = f"{weights} in blocks of {block}" if block else "floats"
    return f"dense in {how}, token table in {table}"


def _least(menus: Mapping[str, Menu]) -> dict[str, Choice]:
    return {name: menu.choices[0] for name, menu in menus.items()}
