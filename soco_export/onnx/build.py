"""The graph and its weights, streamed into one folder, from a description and a source of weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx_ir as ir

from soco_export.files.names import MODEL_FILE
from soco_export.onnx.cache import CacheScales, blank_scales
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.emit.decoder import DecoderBuilder
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.source import WeightSource
from soco_export.onnx.write.graph import DataFile, Graph, NoFile, stamp
from soco_train.events import Notify, silent

STAMP = 1024  # bytes, more than the metadata of a graph take
ONNX_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def write_graph(
    architecture: Architecture,
    source: WeightSource,
    settings: ExportSettings,
    folder: Path,
    notify: Notify,
    metadata: Mapping[str, str] | None = None,
    scales: Sequence[CacheScales] = (),
) -> None:
    """Stream the weights into `folder`/model.onnx.data and write the graph, with `metadata` in it, beside them.

    scales: of each layer's cache, where that is rounded.
    """
    data = DataFile(folder / f"{MODEL_FILE}.data")
    try:
        graph = Graph(data, ONNX_DTYPES[settings.dtype])
        model = DecoderBuilder(architecture, source, settings, graph, scales).build(notify)
    finally:
        data.close()
    stamp(model, metadata or {})
    ir.save(model, folder / MODEL_FILE)


def count_bytes(architecture: Architecture, source: WeightSource, settings: ExportSettings) -> int:
    """Return the bytes that model.onnx and model.onnx.data have at most; no numbers are needed.

    What `stamp` will say of the model's origin is not known yet: that has `STAMP`, and all else is exact.
    """
    data = NoFile(Path(f"{MODEL_FILE}.data"))
    graph, scales = Graph(data, ONNX_DTYPES[settings.dtype]), blank_scales(architecture, settings)
    model = DecoderBuilder(architecture, source, settings, graph, scales).build(silent)
    return data.size + len(ir.to_proto(model).SerializeToString()) + STAMP
