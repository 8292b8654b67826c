"""Names of files that more than one room reads."""

MODEL_FILE = "model.onnx"
