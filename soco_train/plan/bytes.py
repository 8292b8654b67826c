"""Bytes as the budget: what a layer takes in the ONNX file in each form, rank, type and block, and the best choice.

Every tensor of the file starts on a page, every row of a rounded matrix is padded to whole blocks, and a block has its
scale: all of that is counted. Pure: shapes and errors in, choices out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from soco_train.forms.registry import find_form
from soco_train.plan.allocation import best_rungs
from soco_train.settings.rounding import BITS, WeightType
from soco_train.store.damage import DENSE, Damage, LayerDamage, StorageKind

PAGE = 4096  # where tensors of the data file start
_TRIED = 8  # choices of the largest layer
_RANKS = 128  # sizes of a layer that are looked at in each form and type
_SCALE = 2  # bytes
_Reals = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Packing:
    """How matrices are written: bytes of a float, whether zeros are stored beside the scales."""

    float_bytes: int = 4
    symmetric: bool = True

    def matrix(self, rows: int, columns: int, weights: WeightType, block: int) -> int:
        """Return the bytes of a matrix [rows, columns]: floats, or levels and scales (and zeros) of whole blocks."""
        if weights == "same":
            return pages(rows * columns * self.float_bytes)
        bits, blocks = BITS[weights], -(-columns // block)
        zeros = 0 if self.symmetric else rows * -(-blocks * bits // 8)
        return pages(rows * blocks * block * bits // 8) + self._scales(rows, blocks) + pages(zeros)

    def table(self, rows: int, columns: int, weights: WeightType, block: int) -> int:
        """Return the bytes of a token table: always symmetric, and its last block not padded."""
        if weights == "same":
            return self.matrix(rows, columns, weights, block)
        return pages(rows * (columns * BITS[weights] // 8)) + self._scales(rows, -(-columns // block))

    def vector(self, entries: int) -> int:
        """Return the bytes of a bias."""
        return pages(entries * self.float_bytes)

    def layer(self, choice: Choice, shape: tuple[int, int]) -> int:
        """Return the bytes of a layer's matrices, without its bias."""
        if choice.form == DENSE:
            return self.matrix(*shape, choice.weights, choice.block)
        matrices, others = _parts(choice.form, *shape, choice.rank)
        return sum(self.matrix(*part, choice.weights, choice.block) for part in matrices) + sum(map(pages, others))

    def _scales(self, rows: int, blocks: int) -> int:
        return pages(rows * blocks * _SCALE)


def pages(size: int) -> int:
    """Return `size` bytes as whole pages."""
    return size + -size % PAGE


@lru_cache(maxsize=65536)
def _parts(form: str, m: int, n: int, rank: int) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...]]:
    """Return (shapes of the matrices, bytes of whatever else) that a form stores of an [m, n] layer."""
    blank = vars(find_form(form).blank(m, n, rank, bias=False))
    tensors = [tensor for tensor in blank.values() if tensor is not None]
    matrices = tuple((int(part.shape[0]), int(part.shape[1])) for part in tensors if part.is_floating_point())
    return matrices, tuple(part.nbytes for part in tensors if not part.is_floating_point())


@dataclass(frozen=True)
class Tables:
    """The modules of token table and head, and whether they hold one matrix."""

    table: str
    head: str
    tied: bool


@dataclass(frozen=True)
class Choice:
    """One way to store a layer: `dense` or a form, its rank, type of its matrices, inputs of a block (0: floats)."""

    form: str
    rank: int
    weights: WeightType
    block: int = 0


@dataclass(frozen=True)
class Menu:
    """The choices of one layer that are worth their bytes: rising in `bytes`, falling in `errors`."""

    choices: tuple[Choice, ...]
    bytes: npt.NDArray[np.int64]
    errors: _Reals

    @staticmethod
    def of(offers: Iterable[tuple[Choice, int, float]]) -> Menu:
        """Return the menu of (choice, bytes, error): whatever another choice beats in both is left out."""
        choices, sizes, errors = zip(*offers, strict=True)
        return Menu.best(np.array(sizes, np.int64), np.array(errors, np.float64), choices.__getitem__)

    @staticmethod
    def best(sizes: npt.NDArray[np.int64], errors: _Reals, choice: Callable[[int], Choice]) -> Menu:
        """Return the same of arrays; `choice` gives the one at an index."""
        order = np.lexsort((errors, sizes))
        least = np.minimum.accumulate(errors[order])
        order = order[np.append(True, errors[order][1:] < least[:-1])]
        return Menu(tuple(choice(int(index)) for index in order), sizes[order], errors[order])

    def at(self, rung: int) -> Menu:
        """Return the menu of one of its choices alone."""
        return Menu(self.choices[rung : rung + 1], self.bytes[rung : rung + 1], self.errors[rung : rung + 1])


def choose_storage(menus: Mapping[str, Menu], budget: int) -> dict[str, Choice]:
    """Return a choice for each layer: the least sum of errors that was found for at most `budget` bytes.

    All choices at one price per byte (the convex hull), then the best moves that still fit. One layer may be so large
    that a step of it is half the budget, as the token table is in a small model: each of its choices is tried. Where
    the budget is below the smallest sum each layer gets its smallest choice.
    """
    largest = max(menus, key=lambda name: int(menus[name].bytes[-1] - menus[name].bytes[0]))
    tried = [_at_one_price({**menus, largest: menus[largest].at(rung)}, budget) for rung in _spread(menus[largest])]
    within = [choices for choices in tried if bytes_of(menus, choices) <= budget]
    least = {name: menu.choices[0] for name, menu in menus.items()}
    return min(within, key=lambda choices: errors_of(menus, choices), default=least)


def _spread(menu: Menu) -> list[int]:
    """Return all rungs of a menu, or some that are spread evenly over a long one."""
    return sorted({int(rung) for rung in np.linspace(0, len(menu.choices) - 1, min(_TRIED, len(menu.choices)))})


def _at_one_price(menus: Mapping[str, Menu], budget: int) -> dict[str, Choice]:
    scale = max((float(menu.errors.max()) for menu in menus.values()), default=0.0) or 1.0
    costs, values = zip(*((menu.bytes, -menu.errors / scale) for menu in menus.values()), strict=True)
    rungs = best_rungs(costs, values, budget)
    return {name: menu.choices[rung] for (name, menu), rung in zip(menus.items(), rungs, strict=True)}


def menus_of(damage: Damage, packing: Packing, multiple: int, tables: Tables) -> dict[str, Menu]:
    """Return what each layer of `damage` can be; ranks are multiples of `multiple`, at most some 128 of them."""
    layers = {
        name: _menu(layer, packing, multiple)
        for name, layer in damage.layers.items()
        if name not in (tables.table, tables.head)
    }
    return layers | table_menus(damage, packing, tables)


def table_menus(damage: Damage, packing: Packing, tables: Tables) -> dict[str, Menu]:
    """Return what the token table can be, and the head where that is a matrix of its own or needs a copy."""
    table, head = damage.layers[tables.table], damage.layers.get(tables.head)
    m, n = table.shape
    errors = {kind: float(curve[0]) for kind, curve in table.curves.items()}
    whole = _in_one_copy(errors, n) if head is not None and tables.tied else []
    shared = {kind: errors[kind] + float(head.curves[kind][0]) for kind in whole if head and kind in head.curves}
    offers = [
        (Choice(form, min(m, n), weights, block), packing.table(m, n, weights, block), error)
        for (form, weights, block), error in (shared or errors).items()
    ]
    found = {tables.table: Menu.of(offers)}
    if head is not None and not shared:
        rounded = {kind: curve for kind, curve in head.curves.items() if not tables.tied or kind[1] != "same"}
        found[tables.head] = _menu(replace(head, curves=rounded), packing, 1)
    return found


def _in_one_copy(kinds: Collection[StorageKind], width: int) -> list[StorageKind]:
    """Return how a table can be both read by rows and multiplied with: in blocks that divide its width, or in floats.

    Where only floats would be left nothing is: a head of its own can then be rounded.
    """
    divides = [kind for kind in kinds if width % (kind[2] or 1) == 0]
    rounded = {kind for kind in kinds if kind[2]}
    return divides if rounded.intersection(divides) or not rounded else []


def _menu(layer: LayerDamage, packing: Packing, multiple: int) -> Menu:
    full = min(layer.shape)
    bias = packing.vector(layer.shape[0]) if layer.biased else 0
    step = multiple * max(1, full // (multiple * _RANKS))
    kinds, sizes, errors = list(layer.curves), [], []
    ranks = [range(full, full + 1) if kind[0] == DENSE else range(max(multiple, step), full, step) for kind in kinds]
    for kind, some in zip(kinds, ranks, strict=True):
        dense = kind[0] == DENSE
        sizes.append(_sizes(packing, layer.shape, kind, some) + (0 if dense else bias))
        errors.append(layer.curves[kind][:1].numpy() if dense else layer.curves[kind].numpy()[some.start : full : step])
    starts = np.cumsum([0, *map(len, ranks)])

    def choice(index: int) -> Choice:
        at = int(np.searchsorted(starts, index, side="right")) - 1
        form, weights, block = kinds[at]
        return Choice(form, ranks[at][index - int(starts[at])], weights, block)

    return Menu.best(np.concatenate(sizes), np.concatenate(errors), choice)


@lru_cache(maxsize=4096)
def _sizes(packing: Packing, shape: tuple[int, int], kind: StorageKind, ranks: range) -> npt.NDArray[np.int64]:
    """Return the bytes of a layer at each rank: layers of a model have few shapes."""
    form, weights, block = kind
    return np.array([packing.layer(Choice(form, rank, weights, block), shape) for rank in ranks], np.int64)


def bytes_of(menus: Mapping[str, Menu], choices: Mapping[str, Choice]) -> int:
    """Return the bytes that the menus count for these choices."""
    return sum(int(menu.bytes[menu.choices.index(choices[name])]) for name, menu in menus.items())


def errors_of(menus: Mapping[str, Menu], choices: Mapping[str, Choice]) -> float:
    """Return the errors that the menus count for these choices."""
    return sum(float(menu.errors[menu.choices.index(choices[name])]) for name, menu in menus.items())
