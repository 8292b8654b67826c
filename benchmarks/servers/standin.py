"""Stands in for Triton's ONNX Runtime backend where there is none: runs the graph that lies beside it.

Read by Triton's Python backend as model.py of `decoder`; benchmarks.servers.triton puts it there.
"""

from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    """The name and the methods that Triton looks for."""

    def initialize(self, args):
        """Open the model by path: its weights lie beside it."""
        path = Path(__file__).parent / "model.onnx" / "model.onnx"
        self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.inputs = [entry.name for entry in self.session.get_inputs()]

    def execute(self, requests):
        """Run the graph for each request."""
        return [self._run(request) for request in requests]

    def _run(self, request):
        feeds = {name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs}
        names = list(request.requested_output_names())
        found = self.session.run(names, feeds)
        return triton.InferenceResponse([triton.Tensor(*pair) for pair in zip(names, found, strict=True)])
