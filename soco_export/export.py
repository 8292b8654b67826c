"""The door: one HF folder in, one ONNX folder out, complete or not there at all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from soco_export.checkpoint.load import load_checkpoint, tensors_of_class
from soco_export.checkpoint.record import planned_types
from soco_export.files.json import read_generation_config
from soco_export.files.records import check_apart, folder_bytes
from soco_export.files.replacing import check_replaceable, replacing_folder
from soco_export.files.tokenizer import check_tokenizer_files
from soco_export.onnx.build import write_graph
from soco_export.onnx.cache import CacheScales, cache_scales
from soco_export.onnx.calibrate import KeptLevels, RoundingFigures, calibrate
from soco_export.onnx.check import check_architecture, check_head, check_stored_biases, check_tensors
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.describe.config import Config, resolve_config
from soco_export.onnx.emit.linear import find_finish
from soco_export.onnx.inspect import GraphSummary, summarise_graph
from soco_export.onnx.narrow import check_values, narrowed
from soco_export.onnx.read import CheckpointWeights, open_weights
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.trace import export_traced
from soco_export.runtimes.registry import Layout, check_runtimes, write_layouts
from soco_train.errors import RecipeError
from soco_train.events import Notify, silent


@dataclass(frozen=True)
class ExportSummary:
    """What was written.

    `route`: `builder` or `traced` (the fallback); `forms`: Linears by form (builder only); `bytes`: on disk;
    `rounding`: of calibrated rounding, layer by layer.
    """

    folder: Path
    route: str
    flavour: str
    forms: dict[str, int]
    bytes: int
    graph: GraphSummary
    rounding: RoundingFigures | None = None


def export_onnx(
    folder: Path,
    out: Path,
    settings: ExportSettings,
    notify: Notify = silent,
    calibration: Callable[[], torch.Tensor] | None = None,
    provenance: Mapping[str, str] | None = None,
    trust_remote_code: bool = False,
) -> ExportSummary:
    """Write the causal LM in the HF folder `folder` as the ONNX folder `out`.

    calibration: returns token blocks [b, t] of text like that which the model is for; asked once, where the rule of
    rounding calibrates or the cache is rounded; provenance: what else to write into the graph's metadata of where the
    model comes from; trust_remote_code: whether code that lies in `folder` may run.
    Weights are streamed one at a time. `out` appears, or replaces the export that was there, when everything is in it.
    Raises RecipeError for an architecture, option or `out` that cannot be served, DataError for a checkpoint that is
    not what its config says; both before anything is written.
    """
    check_apart(out, [folder], where=str(out))
    check_replaceable(out)
    config, settings, architecture, source = open_folder(folder, settings, trust_remote_code)
    _check_calibration(settings, calibration)
    forms = Counter(source.form(name).kind for name in architecture.linears()) if architecture else Counter[str]()
    metadata = {**_described(config, settings, forms), **(provenance or {})}
    rounding: RoundingFigures | None = None
    with replacing_folder(out) as partial:
        if architecture is None:
            model = load_checkpoint(folder, getattr(torch, settings.dtype), trust_remote_code=trust_remote_code)
            export_traced(model, partial, settings, notify, metadata)
        else:
            check_head(architecture, source)
            blocks = _text_for(settings, calibration)
            scales: list[CacheScales] = []
            if blocks is not None and settings.calibrates:
                source.kept = KeptLevels(partial / "levels")
                rounding = calibrate(folder, blocks, settings, source.kept, notify)
            if blocks is not None and settings.cache != "same":
                scales = cache_scales(folder, architecture, blocks, settings.cache, trust_remote_code)
            write_graph(architecture, source, settings, partial, notify, metadata, scales)
            if source.kept:
                source.kept.remove()
        write_layouts(Layout(folder, partial, config, settings))
    return ExportSummary(
        folder=out,
        route="builder" if architecture else "traced",
        flavour=settings.flavour,
        forms=dict(forms),
        bytes=folder_bytes(out),
        graph=summarise_graph(out),
        rounding=rounding,
    )


def open_folder(
    folder: Path, settings: ExportSettings, trust_remote_code: bool = False
) -> tuple[Config, ExportSettings, Architecture | None, CheckpointWeights]:
    """Return what a graph is made of: config.json, settings with the plan's types, description, weights by name.

    Reads small files and headers. Raises RecipeError and DataError for all that an export of `folder` refuses, short
    of values: a run asks this of its dense model before it trains.
    """
    config = resolve_config(folder, trust_remote_code)
    check_tokenizer_files(folder)
    read_generation_config(folder, config.get("vocab_size"))
    settings = settings.planned(*planned_types(config.values))
    architecture = check_architecture(config, settings)
    source = open_weights(folder, architecture)
    if architecture is not None:
        architecture = _checked(architecture, source, settings)
        check_stored_biases(architecture, source, tensors_of_class(folder, trust_remote_code))
    check_runtimes(settings, architecture)
    return config, settings, architecture, source


def _checked(architecture: Architecture, source: CheckpointWeights, settings: ExportSettings) -> Architecture:
    """Return the description of what the folder stores; raises for a tensor, a form or values that have no place."""
    check_tensors(architecture, source)
    for kind in {source.form(name).kind for name in architecture.linears()}:
        find_finish(kind)
    found = narrowed(architecture, source)
    check_values(found, settings)
    return found


def _described(config: Config, settings: ExportSettings, forms: Mapping[str, int]) -> dict[str, str]:
    """Return what the folder and the settings say of the graph: family, how layers are stored, types."""
    blocks = "" if settings.weights == "same" else f", blocks of {settings.quantize.block}, {settings.quantize.rule}"
    return {
        "model_type": str(config["model_type"]),
        "layers": ", ".join(f"{count} {kind}" for kind, count in sorted(forms.items())) or "traced",
        "flavour": settings.flavour,
        "dtype": settings.dtype,
        "weights": f"{'mixed, else ' if settings.each else ''}{settings.weights}{blocks}",
    }


def _check_calibration(settings: ExportSettings, calibration: Callable[[], torch.Tensor] | None) -> None:
    asking = {
        "export.quantize.rule": (settings.quantize.rule, settings.calibrates, "nearest"),
        "export.cache": (settings.cache, settings.cache != "same", "same"),
    }
    for key, (said, asks, without) in asking.items():
        if asks and calibration is None:
            raise RecipeError(
                f"{key} is {said}, and there is no calibration text",
                fix=f"give export_onnx the token blocks of one, or {key.rpartition('.')[2]}: {without}",
                where=key,
            )


def _text_for(settings: ExportSettings, calibration: Callable[[], torch.Tensor] | None) -> torch.Tensor | None:
    """Return the token blocks [b, t] that weights and cache are rounded by, None where neither asks for any."""
    if calibration is None or not settings.reads_text:
        return None
    blocks = calibration()
    return blocks[: max(1, settings.quantize.calibration_tokens // blocks.shape[1])]
