"""What a plan reads of scores, without torch: the importance of every component; and what scores on disk have to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from soco_train.bounded import MADE_ANEW, answering
from soco_train.errors import DataError
from soco_train.store.arrays import Provenance, layer_shape, read_arrays

PAIRS = (("correction", "C", "A"), ("adapter", "C", "A"), ("components", "P", "B"))  # and what their halves are called
_Layer = tuple[tuple[int, int], dict[str, Any]]  # (m, n), and arrays or tensors by the name of the part


@dataclass(frozen=True)
class LayerImportance:
    """What a plan asks of one layer.

    importance: [k] float64, larger lives longer; shape: (m, n) of the dense weight; deviates: whether it has a
    deviation, which costs m once it is pruned.
    """

    importance: npt.NDArray[np.float64]
    shape: tuple[int, int]
    deviates: bool


@dataclass(frozen=True)
class Importances:
    """The importances of all participating layers, and where their scores come from."""

    layers: Mapping[str, LayerImportance]
    provenance: Provenance = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many parameters the whole dense model has; DataError where that was not written."""
        found = self.provenance.get("parameters")
        if type(found) is not int or found < 1:
            raise DataError(
                f"the scores say that their model has {str(found)[:60]} parameters", fix=MADE_ANEW, where="provenance"
            )
        return found

    @staticmethod
    def load(path: Path) -> Importances:
        """Read those of `scores.safetensors`; DataError for whatever `Scores.load` refuses."""
        arrays, header = read_arrays(path, "scores")
        stored, provenance = checked_layers(path, arrays, header, lambda array: bool(np.isfinite(array).all()))
        layers = {
            name: LayerImportance(parts["importance"].astype(np.float64), shape, "deviation" in parts)
            for name, (shape, parts) in stored.items()
        }
        return Importances(layers, provenance)


def checked_layers(
    path: Path, tensors: Mapping[str, Any], header: Mapping[str, Any], finite: Callable[[Any], bool]
) -> tuple[dict[str, _Layer], Provenance]:
    """Return (shape and parts of each layer, provenance) of a scores file, read as arrays or as tensors.

    DataError if there is no layer, or a part of one is missing, not of the layer's shape, or not `finite`.
    """

    def make() -> tuple[dict[str, _Layer], Provenance]:
        layers = {name: _layer(name, shape, tensors, finite) for name, shape in header["shapes"].items()}
        if not layers:
            raise ValueError("there is no layer in them")
        return layers, dict(header["provenance"])

    found: tuple[dict[str, _Layer], Provenance] = answering("these are no scores", str(path), MADE_ANEW, make)
    return found


def _layer(name: str, shape: Any, tensors: Mapping[str, Any], finite: Callable[[Any], bool]) -> _Layer:
    m, n = layer_shape(name, shape)
    k = min(m, n)
    names = ["importance", "scale", *(["deviation"] if f"{name}:deviation" in tensors else [])]
    for pair, *halves in PAIRS:
        if f"{name}:{pair}.{halves[0]}" in tensors:
            names += [f"{pair}.{half}" for half in halves]
    parts = {part: tensors[f"{name}:{part}"] for part in names}
    r, q = (parts[part].shape[-1] if part in parts else 0 for part in ("correction.C", "adapter.C"))
    shapes = {
        "importance": (k,),
        "scale": (k,),
        "deviation": (m,),
        "correction.C": (k, r),
        "correction.A": (r, n),
        "adapter.C": (m, q),
        "adapter.A": (q, n),
        "components.P": (m, k),
        "components.B": (k, n),
    }
    for part, found in parts.items():
        if tuple(found.shape) != shapes[part] or not finite(found):
            raise ValueError(f"{part} of {name} is not {list(shapes[part])} finite numbers")
    return (m, n), parts
