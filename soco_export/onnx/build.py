"""The graph and its weights, streamed into one folder, from a description and a source of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.emit.decoder import DecoderBuilder
from soco_export.onnx.inspect import MODEL_FILE
from soco_export.onnx.read import WeightSource
from soco_export.onnx.settings import ExportSettings
from soco_export.onnx.write.graph import DataFile, Graph, stamp
from soco_train.events import Notify

DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


def write_graph(
    architecture: Architecture,
    source: WeightSource,
    settings: ExportSettings,
    folder: Path,
    notify: Notify,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Stream the weights into `folder`/model.onnx.data and write the graph, with `metadata` in it, beside them."""
    data = DataFile(folder / f"{MODEL_FILE}.data")
    try:
        graph = Graph(data, DTYPES[settings.dtype])
        model = DecoderBuilder(architecture, source, settings, graph).build(notify)
    finally:
        data.close()
    stamp(model, metadata or {})
    ir.save(model, folder / MODEL_FILE)
