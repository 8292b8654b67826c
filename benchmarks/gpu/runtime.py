"""d: ONNX Runtime's CUDA provider on a 7B-shaped model of four layers, dense against low rank, PyTorch beside it.

All models of a series take turns (benchmarks.speed.series). Opening a graph proves that its nodes run on CUDA;
PyTorch's passes are replays of a CUDA graph. On a CPU the twin runs small widths in fp32, PyTorch without graphs.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnxruntime
import torch

from benchmarks.gpu.box import TimeBox
from benchmarks.gpu.document import Figures
from benchmarks.gpu.options import CUDA, Options
from benchmarks.gpu.sections import Skipped
from benchmarks.gpu.torch_models import torch_decoders
from benchmarks.speed.models import architecture_of, forms_of, uniform_plan, write_model
from benchmarks.speed.series import measure
from soco_export.bench.roofline import measure_bandwidth
from soco_export.evaluate.decoders.session import OnnxDecoder
from soco_export.evaluate.settings import CPU
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import StoredForm
from soco_train.errors import MachineError, SocoError
from soco_train.plan.rank_plan import RankPlan
from soco_train.settings.plan import Storage

PROVIDER = "CUDAExecutionProvider"
KINDS = {
    "fp16": ExportSettings(dtype="float16"),
    "int4": ExportSettings(dtype="float16", weights="int4"),
    "bf16": ExportSettings(dtype="bfloat16"),
    "fp32": ExportSettings(),
    "int4 of fp32": ExportSettings(weights="int4"),
}
ON_CUDA, ON_CPU = ("fp16", "int4", "bf16"), ("fp32", "int4 of fp32")
KEEPS = (0.8, 0.6)
FORMS: tuple[Storage, ...] = ("stacked", "pivoted")
MULTIPLE = {True: 16, False: 64}  # of ranks, by --small
SECONDS = 4.0  # for one workload of one series, of all its models together


def parts(options: Options) -> Sequence[str]:
    """Return a process for each kind of weights."""
    return ON_CUDA if CUDA else ON_CPU


def pieces(options: Options, part: str, box: TimeBox) -> Iterator[tuple[str, Any]]:
    """Yield ONNX Runtime's series, with PyTorch in it where it has such weights."""
    if CUDA and PROVIDER not in onnxruntime.get_available_providers():
        found = ", ".join(onnxruntime.get_available_providers())
        raise Skipped(f"onnxruntime {onnxruntime.__version__} has no {PROVIDER} (it has {found})")
    if not CUDA and not options.small:
        raise Skipped("no CUDA device; --small measures the twin on the CPU")
    yield part, partial(series, part, options, box)


def series(kind: str, options: Options, box: TimeBox) -> Figures:
    """Write the graphs of one kind, each in a process, and time them in turns beside PyTorch's models."""
    work = options.work / "runtime" / kind.replace(" ", "-")
    shutil.rmtree(work, ignore_errors=True)
    model = "7b-small" if options.small else "7b"
    architecture, settings = architecture_of(model, work / "dense"), KINDS[kind]
    plans: dict[str, RankPlan | None] = {"dense": None}
    for keep in KEEPS:
        for form in FORMS:
            plans[f"{keep:g} {form}"] = uniform_plan(architecture, keep, form, MULTIPLE[options.small])
    try:
        folders = write_all(model, plans, work, settings)
        box.check()
        seconds = min(0.1 if options.small else SECONDS, box.left / 6)
        figures = on_provider(folders, options.threads, seconds)
        if settings.weights == "same":
            figures |= beside(folders, plans, getattr(torch, settings.dtype), options.threads, seconds)
    finally:
        shutil.rmtree(work)
    return {**figures, "bandwidth": measure_bandwidth(options.threads, "cuda" if CUDA else "cpu")}


def on_provider(folders: Mapping[str, Path], threads: int, seconds: float) -> dict[str, Any]:
    """Time ONNX Runtime's graphs; those of which a node falls back to the CPU are named and left out."""
    try:
        return {"entries": _timed(folders, {}, threads, seconds)}
    except MachineError:
        fallen = {name: why for name, folder in folders.items() if (why := falls_back(folder, threads))}
    rest = {name: folder for name, folder in folders.items() if name not in fallen}
    entries = _timed(rest, {}, threads, seconds) if rest else []
    return {"entries": entries, "fallen": fallen, "error": f"fell back to the CPU: {'; '.join(fallen.values())}"}


def falls_back(folder: Path, threads: int) -> str:
    """Return what of a graph does not run on the provider, "" if all of it does."""
    try:
        OnnxDecoder(folder, PROVIDER if CUDA else CPU, threads)
    except MachineError as error:
        return str(error)
    return ""


def beside(
    folders: Mapping[str, Path], plans: Mapping[str, RankPlan | None], dtype: torch.dtype, threads: int, seconds: float
) -> dict[str, Any]:
    """Time PyTorch's models in turns with the dense graph; what goes wrong costs ONNX Runtime's figures nothing."""
    try:
        others = torch_decoders(folders["dense"], plans, dtype)
        return {"beside": _timed({"dense": folders["dense"]}, others, threads, seconds)}
    except (SocoError, RuntimeError) as error:
        return {"beside": [], "error": f"PyTorch: {error}"}


def _timed(folders: Mapping[str, Path], others: Mapping[str, Any], threads: int, seconds: float) -> list[Any]:
    return [asdict(entry) for entry in measure(folders, others, threads, seconds, PROVIDER if CUDA else CPU)]


def write_all(
    model: str, plans: Mapping[str, RankPlan | None], work: Path, settings: ExportSettings
) -> dict[str, Path]:
    """Export the models, as many at a time as there are cores for; return their folders by name."""
    folders = {name: work / name.replace(" ", "-") for name in plans}
    tasks = [(model, {} if plan is None else forms_of(plan), folders[name], settings) for name, plan in plans.items()]
    workers = min(len(tasks), (os.cpu_count() or 1) // 3)
    if workers < 2:
        for task in tasks:
            write(*task)
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            for done in [pool.submit(write, *task) for task in tasks]:
                done.result()
    return folders


def write(model: str, forms: Mapping[str, StoredForm], folder: Path, settings: ExportSettings) -> None:
    """Export one model."""
    write_model(architecture_of(model, folder), forms, folder, settings)


def row(figures: Figures) -> str:
    """Say a series in a few words: of the first decode / prefill in milliseconds, of the others how much faster."""
    series = [entries for entries in (figures["entries"], figures.get("beside", [])) if entries]
    return " · ".join(_entry(entry, entry is entries[0]) for entries in series for entry in entries)


def _entry(entry: Mapping[str, Any], first: bool) -> str:
    values = entry["milliseconds"].values() if first else [ratio[0] for ratio in entry["speedups"].values()]
    shown = "/".join(f"{value:.3g}" for value in values)
    return f"{entry['name']} {shown}{' ms' if first else '×'}"
