"""Measures what one Linear costs in ONNX Runtime, dense and at a few ranks, in the graphs that the exporter writes.

Each session holds several copies of the layer and all sessions of a shape take turns, so that weights come from memory
as they do in a model, and drift hits every rank alike.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from soco_export.bench.device import Device
from soco_export.bench.layer_times import FormTimes, Profile, Shape, liked_multiple
from soco_export.bench.runner import Run, interleave
from soco_export.evaluate.decoders.session import DEVICES, check_provider, session_options
from soco_export.evaluate.settings import CPU
from soco_export.files.names import MODEL_FILE
from soco_export.onnx.build import ONNX_DTYPES
from soco_export.onnx.emit.linear import Linears
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_export.onnx.write.graph import DataFile, Graph
from soco_export.onnx.write.matrix import Array
from soco_train.events import Event, Notify
from soco_train.forms.registry import state_of
from soco_train.plan.allocation import layer_cost
from soco_train.settings.plan import Storage
from soco_train.settings.rounding import BITS

# Parts of the dense layer's parameters at which a form is measured; the last one saves nothing any more.
SHARES = (0.2, 0.4, 0.55, 0.7, 0.85, 1.0)
_STEPS = (1, 8, 16, 32)
CACHE_BYTES = 1 << 26  # what no last-level cache of two cores holds
MOST_COPIES = 512
SECONDS = 1.5  # for one workload of one shape
_ROUNDS = (3, 60)


class CopiedLayer:
    """A source of weights that holds `copies` random Linears in one form.

    No two are equal: ONNX Runtime packs equal matrices once, and the copies would be read from the cache.
    """

    def __init__(self, shape: Shape, form: StoredForm, copies: int, bias: bool) -> None:
        self.names = [f"copy{index}" for index in range(copies)]
        self._form = form
        self._parts = _random_parts(shape, form, bias)
        self.shapes = {f"{name}.{part}": array.shape for name in self.names for part, array in self._parts.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def form(self, name: str) -> StoredForm:
        """Return the form that all copies have."""
        return self._form

    def levels(self, name: str) -> None:
        """Return nothing: random weights are rounded to nearest."""

    def read(self, name: str) -> Array:
        """Return a part of a copy."""
        copy, _, part = name.partition(".")
        return np.roll(self._parts[part], self.names.index(copy))


def _random_parts(shape: Shape, form: StoredForm, bias: bool) -> dict[str, Array]:
    (m, n), rank = shape, form.rank
    random = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> Array:
        return random.standard_normal((rows, columns), dtype=np.float32) / np.float32(columns**0.5)

    if not form.rank:
        return {"weight": weight(m, n)}
    parts: dict[str, Array] = {}
    for name, blank in state_of(form.kind, m, n, rank, bias).items():
        if blank.ndim == 2:
            parts[name] = weight(*blank.shape)
        else:
            parts[name] = np.zeros(m, np.float32) if blank.is_floating_point() else random.permutation(m)
    return parts


def measure_profile(shapes: Sequence[Shape], form: Storage, device: Device, notify: Notify) -> Profile:
    """Measure every shape in `form`; raises MachineError if the provider is not there."""
    check_provider(device.provider)
    layers: dict[Shape, dict[str, FormTimes]] = {}
    for index, shape in enumerate(shapes):
        layers[shape] = {form: _measure_shape(shape, form, device)}
        notify(Event("latency", index + 1, len(shapes) + 1))
    largest = max(shapes, key=lambda shape: shape[0] * shape[1])
    multiple = _measure_multiple(largest, form, device)
    notify(Event("latency", len(shapes) + 1, len(shapes) + 1))
    return Profile(device.conditions(), multiple, layers)


def rank_grid(shape: Shape, form: Storage) -> tuple[int, ...]:
    """Return the ranks to measure, ascending: near SHARES of the dense parameters, aligned where there is room."""
    m, n = shape
    step = 32 if min(m, n) >= 256 else 8 if min(m, n) >= 32 else 1
    k = min(m, n)
    ranks = np.arange(1, max(2, k + (layer_cost(k, m, n, form) > m * n)))  # what costs as much as dense, or more, too
    costs = layer_cost(ranks, m, n, form) / (m * n)
    nearest = {int(ranks[np.abs(costs - share).argmin()]) for share in SHARES}
    return tuple(sorted({min(max(step, round(rank / step) * step), int(ranks[-1])) for rank in nearest}))


def _measure_shape(shape: Shape, form: Storage, device: Device) -> FormTimes:
    ranks = rank_grid(shape, form)
    forms = [StoredForm(), *(StoredForm(form, rank) for rank in ranks)]
    with tempfile.TemporaryDirectory() as work:
        sessions = [_open(shape, one, device, Path(work)) for one in forms]
        # by workload, then by form
        times = [_time(sessions, tokens, shape, device) for tokens in device.tokens]
    dense, *low = ([column[index] for column in times] for index in range(len(forms)))
    return FormTimes(tuple(dense), ranks, tuple(map(tuple, low)))


def _measure_multiple(shape: Shape, form: Storage, device: Device) -> int:
    """Return the step of ranks that the kernels like, in a decode step of one layer."""
    aligned = min(shape) // 2 // 64 * 64
    if aligned < 64:
        return 1
    forms = [StoredForm(form, aligned - step) for step in (0, *_STEPS)]
    with tempfile.TemporaryDirectory() as work:
        found = _time([_open(shape, one, device, Path(work)) for one in forms], 1, shape, device)
    return liked_multiple(dict(zip((0, *_STEPS), found, strict=True)))


@dataclass(frozen=True)
class _Session:
    session: Any
    copies: int


def _open(shape: Shape, form: StoredForm, device: Device, work: Path) -> _Session:
    copies = _copies(shape, device.export)
    folder = work / f"{form.kind}-{form.rank}"
    folder.mkdir()
    write_layer(folder, CopiedLayer(shape, form, copies, device.bias), shape, device.export)
    options = session_options(device.threads)
    providers = [device.provider] if device.provider == CPU else [device.provider, CPU]
    path = str(folder / MODEL_FILE)
    return _Session(ort.InferenceSession(path, options, providers=providers, enable_fallback=False), copies)


def _copies(shape: Shape, export: ExportSettings) -> int:
    bits = BITS.get(export.weights, 32 if export.dtype == "float32" else 16)
    dense = shape[0] * shape[1] * bits // 8
    return min(MOST_COPIES, max(1, CACHE_BYTES // (4 * dense)))


# x ─┬─ the layer, as exported ── y0
#    ├─ the same, other memory ── y1
#    └─ …
def write_layer(folder: Path, source: CopiedLayer, shape: Shape, export: ExportSettings) -> None:
    """Write a graph with all copies of a layer beside each other."""
    data = DataFile(folder / f"{MODEL_FILE}.data")
    graph = Graph(data, ONNX_DTYPES[export.dtype])
    x = graph.input("x", graph.dtype, [1, "tokens", shape[1]])
    linears = Linears(graph, source, export)
    for name in source.names:
        graph.output(linears(x, name), f"{name}.y", graph.dtype, [1, "tokens", shape[0]])
    data.close()
    ir.save(graph.model("soco-export"), folder / MODEL_FILE)


def _time(sessions: Sequence[_Session], tokens: int, shape: Shape, device: Device) -> list[float]:
    """Return each session's microseconds for one copy of its layer.

    The lower quartile over rounds: what else the machine does only ever adds time, and must not make a rank look slow.
    """
    runs = [_bound(one.session, tokens, shape[1], device) for one in sessions]
    rounds = _rounds(runs)
    series = interleave(runs, rounds, warmup=1, samples=1)
    return [1e3 * float(np.quantile(times, 0.25)) / one.copies for times, one in zip(series, sessions, strict=True)]


def _rounds(runs: Sequence[Run]) -> int:
    for run in runs:  # the first pass also allocates
        run()
    start = time.perf_counter()
    for run in runs:
        run()
    return int(np.clip(SECONDS / (time.perf_counter() - start), *_ROUNDS))


def _bound(session: Any, tokens: int, width: int, device: Device) -> Run:
    where = DEVICES.get(device.provider, "cpu")
    values = np.random.default_rng(1).standard_normal((1, tokens, width))
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", _on_device(values, device.export.dtype, where))
    for output in session.get_outputs():
        binding.bind_output(output.name, where)

    def run() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return run


def _on_device(values: Array, dtype: str, where: str) -> Any:
    if dtype == "bfloat16":  # numpy has none: ones, whose bits are known
        ones = np.full(values.shape, 0x3F80, np.uint16)
        return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(ones, ir.DataType.BFLOAT16)
    return ort.OrtValue.ortvalue_from_numpy(values.astype(dtype), where, 0)
