"""A model as tokens in, logits out, whoever runs it: PyTorch, ONNX Runtime, OpenVINO."""
