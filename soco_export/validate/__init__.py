"""Proof: parity, perplexity and tasks, measured on any decoder (PyTorch or ONNX Runtime)."""
