"""What leaves this package: spectra (all components), scores (any size, later) and factors (this size).

Everything is safetensors with a JSON header for provenance; nothing is pickled. Files are written beside their final
name and moved into place, so that a file with the final name is always whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open

from soco_train.errors import DataError
from soco_train.tensorfile import Pending, write_file

Provenance = Mapping[str, Any]


@dataclass(frozen=True)
class Spectrum:
    """One weight as a sum of components: W = P @ B.

    P: [m, k] with the singular value multiplied in, B: [k, n], sigma: [k] descending, k = min(m, n).
    """

    P: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor


@dataclass(frozen=True)
class LayerScores:
    """What training learnt about one layer's components.

    importance: [k] fp32, larger lives longer; scale: [k] fp32, multiplies the component; deviation: [m] or None,
    added to the layer's output; shape: (m, n) of the dense weight; correction: (C [k, r], A [r, n]) or None, where C A
    is added to the component's B, of whatever size the cut is.
    """

    importance: torch.Tensor
    scale: torch.Tensor
    deviation: torch.Tensor | None
    shape: tuple[int, int]
    correction: tuple[torch.Tensor, torch.Tensor] | None = None


@dataclass(frozen=True)
class StackedFactors:
    """y = up (down x) + bias with up: [m, r], down: [r, n], bias: [m] or None."""

    up: torch.Tensor
    down: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True)
class PivotedFactors:
    """z = pivot x; y[order] = [z ; mix z] (+ bias, already in y's order).

    pivot: [r, n], mix: [m - r, r], order: [m] int64, bias: [m] or None. order[i] is the output row that entry i of
    the concatenation goes to. Source: PIFA (arXiv 2501.19090).
    """

    pivot: torch.Tensor
    mix: torch.Tensor
    order: torch.Tensor
    bias: torch.Tensor | None


LayerFactors = StackedFactors | PivotedFactors
Layer = TypeVar("Layer", bound=LayerFactors)


class LazyLayers(Mapping[str, Layer]):
    """Layers that are made anew each time they are asked for, so that one at a time is in memory.

    forms: the same layers on the meta device, which says how large each will be.
    """

    def __init__(self, forms: Mapping[str, Layer], make: Callable[[str], Layer]) -> None:
        self.forms = forms
        self._make = make

    def __getitem__(self, name: str) -> Layer:
        if name not in self.forms:
            raise KeyError(name)
        return self._make(name)

    def __contains__(self, name: object) -> bool:
        return name in self.forms

    def __iter__(self) -> Iterator[str]:
        return iter(self.forms)

    def __len__(self) -> int:
        return len(self.forms)


def forms_of(layers: Mapping[str, Layer]) -> Mapping[str, Layer]:
    """Return layers without their numbers, on the meta device; what is lazy is not made for that."""
    return layers.forms if isinstance(layers, LazyLayers) else {name: _form(layer) for name, layer in layers.items()}


def _form(layer: Layer) -> Layer:
    parts: dict[str, Any] = {
        part: tensor if tensor is None else tensor.to("meta") for part, tensor in vars(layer).items()
    }
    return type(layer)(**parts)


@dataclass(frozen=True)
class Scores:
    """Scores of all participating layers; one file serves every size."""

    layers: Mapping[str, LayerScores]
    provenance: Provenance = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write `scores.safetensors`."""
        tensors: dict[str, torch.Tensor] = {}
        for name, layer in self.layers.items():
            tensors[f"{name}:importance"] = layer.importance
            tensors[f"{name}:scale"] = layer.scale
            if layer.deviation is not None:
                tensors[f"{name}:deviation"] = layer.deviation
            if layer.correction is not None:
                tensors[f"{name}:correction.C"], tensors[f"{name}:correction.A"] = layer.correction
        shapes = {name: list(layer.shape) for name, layer in self.layers.items()}
        write_tensors(path, tensors, {"kind": "scores", "shapes": shapes, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path) -> Scores:
        """Read `scores.safetensors`; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "scores")
        layers = {
            name: LayerScores(
                importance=tensors[f"{name}:importance"],
                scale=tensors[f"{name}:scale"],
                deviation=tensors.get(f"{name}:deviation"),
                shape=(shape[0], shape[1]),
                correction=_correction(name, tensors),
            )
            for name, shape in header["shapes"].items()
        }
        return Scores(layers, header["provenance"])


def _correction(name: str, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor] | None:
    left = tensors.get(f"{name}:correction.C")
    return None if left is None else (left, tensors[f"{name}:correction.A"])


@dataclass(frozen=True)
class Factors:
    """The pruned layers of one size. A participating layer that is not here stays dense."""

    layers: Mapping[str, LayerFactors]
    provenance: Provenance = field(default_factory=dict)

    def made(self) -> Factors:
        """Return the same factors with every layer in memory."""
        return Factors(dict(self.layers), self.provenance)

    def save(self, path: Path) -> None:
        """Write `factors.safetensors`; what is lazy is made a layer at a time."""
        forms = forms_of(self.layers)

        @lru_cache(maxsize=1)  # the parts of a layer are written one after the other
        def parts_of(name: str) -> Mapping[str, torch.Tensor]:
            return vars(self.layers[name])

        tensors = {
            f"{name}:{part}": Pending(meta, lambda name=name, part=part: parts_of(name)[part])  # type: ignore[misc]
            for name, form in forms.items()
            for part, meta in vars(form).items()
            if meta is not None
        }
        kinds = {name: type(form).__name__ for name, form in forms.items()}
        write_tensors(path, tensors, {"kind": "factors", "layers": kinds, "provenance": dict(self.provenance)})

    @staticmethod
    def load(path: Path) -> Factors:
        """Read `factors.safetensors`; DataError if it is truncated or of another kind."""
        tensors, header = read_tensors(path, "factors")
        layers = {name: _layer_factors(kind, name, tensors) for name, kind in header["layers"].items()}
        return Factors(layers, header["provenance"])


def _layer_factors(kind: str, name: str, tensors: Mapping[str, torch.Tensor]) -> LayerFactors:
    bias = tensors.get(f"{name}:bias")
    if kind == "StackedFactors":
        return StackedFactors(tensors[f"{name}:up"], tensors[f"{name}:down"], bias)
    return PivotedFactors(tensors[f"{name}:pivot"], tensors[f"{name}:mix"], tensors[f"{name}:order"], bias)


class SpectrumStore(Mapping[str, Spectrum]):
    """A folder with one safetensors file per layer, read lazily: the whole spectrum never has to fit in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def put(self, name: str, spectrum: Spectrum) -> None:
        """Write one layer's spectrum."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_tensors(self._file(name), dict(vars(spectrum)), {"kind": "spectrum"})

    def __getitem__(self, name: str) -> Spectrum:
        if not self._file(name).exists():
            raise KeyError(name)
        tensors, _ = read_tensors(self._file(name), "spectrum")
        return Spectrum(**tensors)

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file(name).exists()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name.removesuffix(".safetensors") for path in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor | Pending], header: Mapping[str, Any]) -> None:
    """Write safetensors atomically, a tensor at a time, with `header` as JSON in the file's metadata.

    Processes may write the same file at the same time: each has its own partial one, and the last to finish stays.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    pending = {name: tensor if isinstance(tensor, Pending) else Pending.of(tensor) for name, tensor in tensors.items()}
    write_file(partial, pending, {"header": json.dumps(header, sort_keys=True)})
    os.replace(partial, path)


def read_tensors(path: Path, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return (tensors, header) of a file written by `write_tensors`; DataError unless it is whole and of `kind`."""
    try:
        with safe_open(str(path), framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("header", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (safe_open is no mapping)
    except (SafetensorError, OSError) as error:
        raise DataError(f"cannot read {path.name}: {error}", fix="delete it and run again", where=str(path)) from error
    if header.get("kind") != kind:
        raise DataError(
            f"{path.name} holds {header.get('kind', 'something else')}, not {kind}",
            fix=f"give the {kind} file of a run folder",
            where=str(path),
        )
    return tensors, header
