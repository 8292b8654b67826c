"""Cold start: how long it takes from nothing to a prompt's first token, as after a deployment or a scale-up."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from soco_export.bench.figures import ColdStart
from soco_export.evaluate.decoders.decoder import IntArray
from soco_export.evaluate.decoders.session import OnnxDecoder, Placement


class _Unproven(OnnxDecoder):
    """Opened as a server does it: without the profiled step that proves where nodes run."""

    def _prove_placement(self) -> Placement:
        self._session.end_profiling()
        return Placement(self.provider, {}, {})


def measure_cold_starts(
    folders: Mapping[str, Path], prompt: IntArray, openings: int, provider: str, threads: int
) -> dict[str, ColdStart]:
    """Open every folder `openings` times, in turns, and answer `prompt` ([1, t]); medians by the folders' names."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in folders}
    for _ in range(openings):
        for name, folder in folders.items():
            times[name].append(_open(folder, prompt, provider, threads))
    medians = {name: np.median(found, axis=0) for name, found in times.items() if found}
    return {
        name: ColdStart(openings, prompt.shape[1], float(load), float(first)) for name, (load, first) in medians.items()
    }


def _open(folder: Path, prompt: IntArray, provider: str, threads: int) -> tuple[float, float]:
    start = time.perf_counter()
    decoder = _Unproven(folder, provider, threads)
    loaded = time.perf_counter()
    decoder.prefill(prompt)
    return 1e3 * (loaded - start), 1e3 * (time.perf_counter() - loaded)
