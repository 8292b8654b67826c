"""Low rank against dense in ONNX Runtime, and against what others write: see benchmarks.speed.run."""
