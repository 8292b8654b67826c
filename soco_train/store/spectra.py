"""The spectra of a model's layers on disk, a safetensors file per layer, and which layers have none for good."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from soco_train.bounded import MADE_ANEW, answering
from soco_train.store.tensorfile import checked, read_tensors, write_tensors


@dataclass(frozen=True)
class Spectrum:
    """One weight as a sum of components: W = P @ B.

    P: [m, k] with the singular value multiplied in, B: [k, n], sigma: [k] descending, k = min(m, n).
    """

    P: torch.Tensor
    B: torch.Tensor
    sigma: torch.Tensor


def _checked(spectrum: Spectrum) -> Spectrum:
    (_, k), (inner, _) = spectrum.P.shape, spectrum.B.shape
    if inner != k or spectrum.sigma.shape != (k,):
        raise ValueError("P, B and sigma do not fit together")
    return spectrum


class SpectrumStore(Mapping[str, Spectrum]):
    """A folder with one safetensors file per layer, read lazily: the whole spectrum never has to fit in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _file(self, name: str) -> Path:
        return self.folder / f"{name}.safetensors"

    def put(self, name: str, spectrum: Spectrum) -> None:
        """Write one layer's spectrum; DataError, naming it, if a number is NaN or infinite."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = {part: checked(f"{part} of {name}", tensor) for part, tensor in vars(spectrum).items()}
        write_tensors(self._file(name), parts, {"kind": "spectrum"})
        self._mark(name).unlink(missing_ok=True)

    def leave_out(self, name: str) -> None:
        """Note that there is too little to be known of a layer: it has no spectrum and is not compressed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._file(name).unlink(missing_ok=True)
        self._mark(name).touch()

    def left_out(self, name: str) -> bool:
        """Tell whether a layer was left out."""
        return self._mark(name).exists()

    def decided(self, name: str) -> bool:
        """Tell whether a layer has its spectrum, or was left out."""
        return name in self or self.left_out(name)

    def _mark(self, name: str) -> Path:
        return self.folder / f"{name}.left-out"

    def __getitem__(self, name: str) -> Spectrum:
        if not self._file(name).exists():
            raise KeyError(name)
        tensors, _ = read_tensors(self._file(name), "spectrum")
        made: Spectrum = answering(
            "this is no spectrum", str(self._file(name)), MADE_ANEW, lambda: _checked(Spectrum(**tensors))
        )
        return made

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self._file(name).exists()

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(path.name.removesuffix(".safetensors") for path in self.folder.glob("*.safetensors")))

    def __len__(self) -> int:
        return sum(1 for _ in self)
