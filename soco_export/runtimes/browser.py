"""transformers.js, in a browser or under Node: a folder in the form of its models on the hub."""

from __future__ import annotations

import shutil

import onnx

from soco_export.files.atomic import link
from soco_export.files.json import FIX
from soco_export.files.names import MODEL_FILE
from soco_export.onnx.describe.architecture import Architecture
from soco_export.onnx.settings import ExportSettings
from soco_export.runtimes.openvino import refuse_quantised_table
from soco_export.runtimes.optimum import write_hugging_face_files
from soco_export.runtimes.registry import Layout, Runtime, runtime, write_json
from soco_train.bounded import read_json
from soco_train.errors import RecipeError

NAME = "transformers.js"
# Its words for types and what it appends to the file's name: utils/dtypes.js of transformers.js 4.3.
FILES_BY_TYPE = {
    ("float32", "same"): ("fp32", ""),
    ("float16", "same"): ("fp16", "_fp16"),
    ("float32", "int8"): ("q8", "_quantized"),
    ("float32", "int4"): ("q4", "_q4"),
    ("float16", "int4"): ("q4f16", "_q4f16"),
    ("float32", "int2"): ("q2", "_q2"),
    ("float16", "int2"): ("q2f16", "_q2f16"),
}


@runtime(NAME)
class TransformersJs(Runtime):
    """A model folder in `transformers.js/` to be served as it is; the weights are linked, not copied, where possible.

    Its ONNX Runtime for WebAssembly has no GatherBlockQuantized: the token table stays in floats.
    """

    install = "install Node.js: examples/browser"
    target = (
        "export.flavour=standard",
        "export.quantize.embedding=same",
        "export.layouts=[optimum, transformers.js]",
    )

    def check(self, settings: ExportSettings, architecture: Architecture | None) -> None:
        """Raise RecipeError for types that it has no name or no operator for."""
        refuse_quantised_table(settings, NAME)
        if (settings.dtype, settings.weights) not in FILES_BY_TYPE:
            raise RecipeError(
                f"{NAME} has no name for weights in {settings.weights} beside {settings.dtype}",
                fix="export.dtype: float32",
                where="export.dtype",
            )

    def write(self, to: Layout) -> None:
        """Write config and tokenizer, and below them the graph with its weights, by the names that it looks for."""
        dtype, suffix = FILES_BY_TYPE[to.settings.dtype, to.settings.weights]
        root = to.folder / NAME
        graph = root / "onnx" / f"model{suffix}.onnx"
        graph.parent.mkdir(parents=True)
        write_hugging_face_files(to.source, root)
        told = {"dtype": dtype, "use_external_data_format": True}
        write_json(root / "config.json", {**read_json(root / "config.json", FIX), f"{NAME}_config": told})
        model = onnx.load(to.folder / MODEL_FILE, load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = f"{graph.name}_data"
        graph.write_bytes(model.SerializeToString(deterministic=True))
        link(to.folder / f"{MODEL_FILE}.data", graph.with_name(f"{graph.name}_data"))

    def here(self) -> str | None:
        """Return where Node.js is; a browser needs nothing installed."""
        return shutil.which("node")
