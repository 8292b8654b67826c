"""An exported ONNX folder as a `Decoder` in OpenVINO, on its CPU device, computing in float32."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openvino

from soco_export.evaluate.decoders.decoder import Decoder, FloatArray, IntArray
from soco_export.files.names import MODEL_FILE
from soco_train.errors import DataError


class OpenVinoDecoder(Decoder):
    """model.onnx beside its external data, read and compiled by OpenVINO; DataError if it cannot."""

    def __init__(self, folder: Path, threads: int = 2, name: str = "openvino") -> None:
        super().__init__(name)
        # without the hint it computes in bfloat16 where the processor can
        settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
        path = folder / MODEL_FILE
        try:
            self._model = openvino.Core().compile_model(str(path), "CPU", settings)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-300:]
            raise DataError(
                f"OpenVINO does not load {path.name}: {reason}",
                fix="export with --target openvino, or validate.runtime: ort",
                where=str(path),
            ) from error
        self._inputs = {port.get_any_name(): port for port in self._model.inputs}
        # a value may have several names: those of the graph's outputs are looked for
        self._outputs = [next(filter(_is_output, port.get_names())) for port in self._model.outputs]
        self._request = self._model.create_infer_request()

    def _forward(self, ids: IntArray, mask: IntArray, positions: IntArray, past: Any) -> tuple[FloatArray, Any]:
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **(past or {})}
        feeds = {
            name: np.ascontiguousarray(given[name]) if name in given else _empty(port, len(ids))
            for name, port in self._inputs.items()
        }
        found = dict(zip(self._outputs, self._request.infer(feeds).values(), strict=True))
        logits: FloatArray = found.pop("logits").astype(np.float32)
        return logits, {name.replace("present.", "past_key_values."): value for name, value in found.items()}

    def repeatable(self, ids: IntArray) -> Callable[[], None]:
        """Return a function that runs the same pass behind the present cache each time; for timing. ids: [b, n]."""
        mask, positions = self._continue_mask(ids, None)
        past = self._past

        def run() -> None:
            self._forward(ids, mask, positions, past)

        return run


def _is_output(name: str) -> bool:
    return name == "logits" or name.startswith("present.")


def _empty(port: Any, batch: int) -> Any:
    """Return a cache without tokens, [batch, heads, 0, head size]."""
    shape = port.get_partial_shape()
    heads, size = shape[1].get_length(), shape[3].get_length()
    return np.zeros((batch, heads, 0, size), port.get_element_type().to_dtype())
